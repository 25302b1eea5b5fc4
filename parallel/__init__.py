"""How the work is spread: mesh, tensor-parallel layers, pipeline schedule, ZeRO engine."""
