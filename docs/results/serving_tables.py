"""The tables of serving_ratios.py, from its rows."""

from statistics import median
from typing import Any

Row = dict[str, Any]
RATIOS: dict[str, list[tuple[str, str, str]]] = {
    "batching": [
        ("output_tokens_per_s", "continuous", "static"),
        ("output_tokens_per_s", "continuous", "dynamic"),
        ("predicted_steps", "static", "continuous"),
    ],
    "prefix": [("ttft_s", "warm", "cold"), ("output_tokens_per_s", "with", "without")],
    "chunked": [(f"itl_{which}_s", "256", "4096") for which in ("p99", "max")],
    "kv-int8": [("bytes_per_token", "int8", "auto")],
    "throughput": [
        ("output_tokens_per_s", "infopt", "generate"),
        ("output_tokens_per_s", "infopt", "generate_batch"),
    ],
}
"""What of which variant over which other, each within its round."""


def tables(rows: list[Row], titles: dict[str, str]) -> str:
    """Markdown, a table a case: of every number the median over rounds."""
    parts = []
    for case, title in titles.items():
        found = [row for row in rows if row["case"] == case]
        variants = list(dict.fromkeys(row["variant"] for row in found))
        keys = list(dict.fromkeys(k for row in found for k in row["told"]))
        if not found:
            continue
        rounds = max(row["round"] for row in found) + 1
        lines = [f"**{case}**: {title} {rounds} rounds.", ""]
        lines += [f"| | {' | '.join(keys)} |", f"|---|{'--:|' * len(keys)}"]
        for variant in variants:
            told = [row["told"] for row in found if row["variant"] == variant]
            values = [[t[key] for t in told if key in t] for key in keys]
            lines.append(f"| {variant} | {' | '.join(map(middle, values))} |")
        lines += ["", *(ratio(found, *which) for which in RATIOS.get(case, ()))]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


def middle(values: list[Any]) -> str:
    if not values or isinstance(values[0], str):
        return "".join(values[:1])
    found = median(values)
    return f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"


def ratio(rows: list[Row], key: str, over: str, under: str) -> str:
    told = {(row["variant"], row["round"]): row["told"].get(key) for row in rows}
    pairs = [(told.get((over, n)), told.get((under, n))) for n in {n for _, n in told}]
    found = [a / b for a, b in pairs if a is not None and b is not None]
    if not found:
        return f"- {key}, {over} ÷ {under}: not measured"
    return f"- {key}, {over} ÷ {under}: {median(found):.3f} ({min(found):.3f} … {max(found):.3f})"
