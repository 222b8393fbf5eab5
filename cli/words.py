"""The words that options of `infopt quantize` take."""

from enum import StrEnum


class Method(StrEnum):
    rtn = "rtn"
    gptq = "gptq"
    auto_gptq = "auto-gptq"
    awq = "awq"
    smoothquant = "smoothquant"
    llm_int8 = "llm-int8"
    nf4 = "nf4"
    fp8 = "fp8"
    autoround = "autoround"
    rotate = "rotate"
    qat = "qat"


class Scheme(StrEnum):
    w2a16 = "W2A16"
    w3a16 = "W3A16"
    w4a16 = "W4A16"
    w8a16 = "W8A16"
    w4a4 = "W4A4-int4"
    w4a8 = "W4A8-int8"
    w8a8 = "W8A8-int8"
    fp8 = "W8A8-fp8"
    nf4 = "NF4"
    mixed = "mixed"
    dense = "W16A16"


class Bits(StrEnum):
    two = "2"
    three = "3"
    four = "4"
    eight = "8"


class GroupSize(StrEnum):
    auto = "auto"
    channel = "channel"
    thirty_two = "32"
    sixty_four = "64"
    hundred_twenty_eight = "128"


class GridWord(StrEnum):
    mse = "mse"
    minmax = "minmax"


class Rounding(StrEnum):
    rtn = "rtn"
    gptq = "gptq"
    autoround = "autoround"


class Fp8(StrEnum):
    dynamic = "dynamic"
    static = "static"
    block = "block"


class KvCache(StrEnum):
    int8 = "int8"
    fp8 = "fp8"


class OffloadWord(StrEnum):
    auto = "auto"
    memory = "memory"
    disk = "disk"


class Format(StrEnum):
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    fp8 = "fp8"
    bitsandbytes = "bitsandbytes"
