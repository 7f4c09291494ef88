"""The one call of the CUDA driver that ditc makes by itself."""

import simulation


def cuMemGetInfo() -> tuple[int, int, int]:
    total = int(simulation.setting("memory_bytes"))
    return 0, total * 3 // 4, total
