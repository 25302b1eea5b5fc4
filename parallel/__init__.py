"""How the work is spread: mesh, tensor-parallel layers, pipeline schedule, ZeRO engine."""

import warnings

# What megatron-core says of optional packages and of options that nothing here sets, at every import.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
