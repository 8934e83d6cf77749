"""A checkpoint of which one rank reads its part."""

from torch import Tensor

from pagewire.engine.loading.checkpoint import Checkpoint, Part, Storage
from pagewire.engine.parallel.shard import ModelShard
from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.quantized_matrix import QuantizedMatrix


class ShardedCheckpoint:
    """Implements Checkpoint: tensors are as the `rank_config` of the shard, its config, says."""

    def __init__(self, checkpoint: Checkpoint, shard: ModelShard) -> None:
        self.config = shard.rank_config
        self._checkpoint = checkpoint
        self._shard = shard

    @property
    def quantized_as(self) -> str | None:
        return self._checkpoint.quantized_as

    def read(self, name: str, into: Tensor, part: Part | None = None) -> None:
        """`part` is this rank's own, and so never given."""
        assert part is None, "a part of a part"
        self._checkpoint.read(name, into, self._shard.part(name))

    def storage(self, name: str) -> Storage:
        return self._checkpoint.storage(name)

    def read_int4(self, name: str, part: Part | None = None) -> Int4Blocks:
        """As `read`. A tied embedding is read in 4 bits to be an LM head, and so split like one."""
        assert part is None, "a part of a part"
        is_lm_head = name == "model.embed_tokens.weight"
        mine = self._shard.lm_head_part if is_lm_head else self._shard.part(name)
        return self._checkpoint.read_int4(name, mine)

    def read_quantized(self, name: str, part: Part | None = None) -> QuantizedMatrix | None:
        """As `read`."""
        assert part is None, "a part of a part"
        return self._checkpoint.read_quantized(name, self._shard.part(name))

    def rope_factors(self) -> Tensor | None:
        return self._checkpoint.rope_factors()
