"""Names that other programs know this one by, in checkpoints and in the environment."""

QUANT_METHOD = "vllm_compress"
CACHE_VARIABLE = "VLLM_COMPRESS_CACHE"
ISA_VARIABLE = "VLLM_COMPRESS_ISA"
