"""GPU kernels, installed as `aaac_ao.kernels`. They import nothing of `aaac_ao`."""
