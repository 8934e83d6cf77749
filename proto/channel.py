"""How routers and workers reach each other over gRPC, the same at both ends."""

# Directly, whatever proxy the environment names; and no two servers share a port.
GRPC_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.so_reuseport", 0))
