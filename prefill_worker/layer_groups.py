"""In which groups of layers the KV of last chunks leaves while their step still runs. Pure.

What a client waits for behind its first token is the transfer of the last group. Small groups make
it short; but a frame costs the same time whatever it holds, on cores that the step needs.
"""

from pagewire.kv_transfer.layout import KVLayout

_MIN_GROUPS = 4


def layer_group_ends(layout: KVLayout, num_pages: int, slot_bytes: int) -> tuple[int, ...]:
    """After how many layers each group ends, in order; the last is the number of layers.

    A group of `num_pages` pages fills about one frame of `slot_bytes`, unless that would leave more
    than a quarter of the layers to the last one.
    """
    frame_layers = max(1, slot_bytes // (num_pages * layout.layer_bytes))
    group_layers = min(frame_layers, -(-layout.num_layers // _MIN_GROUPS))
    return (*range(group_layers, layout.num_layers, group_layers), layout.num_layers)
