"""The encoder: from a weight and its statistics to an `Encoding`."""

from aaac_ao.encode.encode import Encoding, Statistics, check_weight, encode

__all__ = ["Encoding", "Statistics", "check_weight", "encode"]
