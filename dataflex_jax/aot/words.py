"""Estimates as text for a terminal."""

from collections.abc import Sequence

from dataflex_jax.aot.estimate import Estimate
from dataflex_jax.aot.grid import Tried

_GIB = 2**30
_PARTS = ("parameters", "optimizer", "frozen", "batch", "directions", "results", "temporaries", "peak")


def described(estimate: Estimate) -> str:
    """An estimate in a dozen lines."""
    devices = estimate.program.mesh.devices.flat
    axes = ", ".join(f"{axis} {size}" for axis, size in estimate.program.mesh.shape.items())
    lines = [
        f"{estimate.program.model.num_params():,} parameters on {axes} ({devices[0].device_kind}); GiB per device:"
    ]
    lines += [f"  {part:12} {getattr(estimate.memory, part) / _GIB:9.3f}" for part in _PARTS]
    if estimate.card is None:
        if devices[0].platform == "cpu":
            lines.append("Temporaries are the CPU program's: an upper bound of a GPU's, whose compiler --device asks.")
        return "\n".join(lines)
    cost = estimate.cost
    fits = "fits" if estimate.fits else "does NOT fit"
    flops = ", ".join(f"{count:.4g} in {dtype}" for dtype, count in sorted(cost.flops.items())) or "none"
    lines += [
        f"  {'card':12} {estimate.card.memory / _GIB:9.3f}  {fits}",
        f"FLOPs per device: {flops}; memory traffic: {cost.hbm_bytes / 1e9:,.1f} GB",
        f"roofline {1e3 * cost.roofline_seconds:,.2f} ms, collectives {1e3 * cost.communication_seconds:,.2f} ms, "
        f"of these exposed {1e3 * cost.exposed_seconds:,.2f} ms",
        *(f"  {kind:20} {moved / 1e9:9.3f} GB" for kind, moved in sorted(cost.collective_bytes.items())),
        *(f"  {target} x {times}" for target, times in sorted(cost.calls.items())),
    ]
    ceiling = "" if estimate.mfu_ceiling is None else f", MFU {100 * estimate.mfu_ceiling:.1f} %"
    return "\n".join([*lines, f"at most {estimate.tokens_per_second:,.0f} tokens/s on all devices{ceiling}"])


def table(rows: Sequence[Tried]) -> str:
    """A line for each variant."""
    heads = ("GiB", "fits", "roofline ms", "exposed ms", "MFU <=", "tokens/s <=")
    lines = [[*(name.rpartition(".")[2] for name in rows[0].fields), *heads]]
    for row in rows:
        values = [str(value).rstrip("/").rpartition("/")[2] for value in row.fields.values()]
        lines.append(values + ([row.reason] if row.estimate is None else _cells(row.estimate)))
    widths = [max(len(line[place]) for line in lines if len(line) > place + 1) for place in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)), line[-1]])
        for line in lines
    )


def _cells(estimate: Estimate) -> list[str]:
    ceiling = "-" if estimate.mfu_ceiling is None else f"{100 * estimate.mfu_ceiling:.1f} %"
    return [
        f"{estimate.memory.peak / _GIB:.1f}",
        "yes" if estimate.fits else "no",
        f"{1e3 * estimate.cost.roofline_seconds:,.1f}",
        f"{1e3 * estimate.cost.exposed_seconds:,.1f}",
        ceiling,
        f"{estimate.tokens_per_second:,.0f}",
    ]
