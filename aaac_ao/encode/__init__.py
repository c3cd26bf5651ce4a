"""The encoder: from a weight and its statistics to an `Encoding`."""

from aaac_ao.encode.checks import check_weight
from aaac_ao.encode.encode import Encoding, Statistics, encode
from aaac_ao.encode.rows import OutputMetric, output_error

__all__ = ["Encoding", "OutputMetric", "Statistics", "check_weight", "encode", "output_error"]
