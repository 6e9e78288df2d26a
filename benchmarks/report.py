"""Draws and tabulates the rows that bench_loss.py wrote: time and bandwidth against size, and the
table in benchmarks/README.md.

    python benchmarks/report.py             all of results/, and benchmarks/README.md
    python benchmarks/report.py PATH ...    a picture beside each of these, or in these folders

Prints which targets a GPU's rows meet. Without matplotlib there are no pictures; what was not
measured is left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- made by report.py: begin -->", "<!-- made by report.py: end -->"
STYLE = {
    "eager": ("#c8483c", "o"),
    "compile": ("#d99a2b", "s"),
    "reduce-overhead": ("#8a8a8a", "^"),
    "fastpref": ("#1f6fb4", "D"),
}
FIGURES = (
    "pairs", "bytes", "floor_us", "copy_gb_s", "two_launches_us", "wall_us", "wall_us_p20",
    "wall_us_p80", "device_us", "fwd_us", "fwd_gb_s", "bwd_us", "bwd_gb_s", "extra_bytes",
)  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The latest row of each provider and case; figures as floats, None where there is none."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            figures = {name: float(row[name]) if row.get(name) else None for name in FIGURES}
            row["n"] = row["pairs"]
            row["family"] = row.get("family") or "pairs"
            row["members"] = row.get("members") or "2"
            latest[(*case(row), row["provider"])] = row | figures
    return list(latest.values())


def chosen(rows: list[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds of forward and backward by provider, of fp32 predictions against bf16 targets
    that the pair shares, or a list does or not."""
    rows = chosen(rows, pred="fp32", target="bf16")
    rows = [row for row in rows if row["shared"] == "True" or row["family"] != "pairs"]
    if not rows:
        return "no rows of fp32 predictions against bf16 targets"
    names = [n for n in STYLE if any(row["provider"] == n and row["wall_us"] for row in rows)]
    device = rows[0]["device"]
    lines = [
        f"{device}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, fp32 against bf16:",
        "",
    ]
    lines += ["| loss | latents | pairs | " + " | ".join(names) + " | floor | extra bytes |"]
    lines += ["|---" * (len(names) + 5) + "|"]
    seen = dict.fromkeys((row["link"], row["shape"], row["pairs"]) for row in rows)
    for link, shape, pairs in seen:
        case = [r for r in rows if (r["link"], r["shape"], r["pairs"]) == (link, shape, pairs)]
        by_name = {row["provider"]: row for row in case}
        found = [by_name.get(name, {}).get("wall_us") for name in names]
        walls = ["" if wall is None else f"{wall:.0f}" for wall in found]
        ours = by_name.get("fastpref", case[0])
        floor, extra = ours["floor_us"], ours["extra_bytes"]
        cells = [link, shape, f"{pairs:.0f}", *walls]
        cells += [f"{floor:.1f}" if floor else "", f"{extra:.0f}" if extra is not None else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """What was promised of a GPU, as (what, figure, bound, whether the bound is a lower one), as
    far as it was measured: most of the links of pairs, and less of what is beyond them."""
    all_of_ours = chosen(rows, provider="fastpref")
    ours = chosen(all_of_ours, family="pairs")
    peer = {(*case(row), row["provider"]): row for row in rows}

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    def ratio(row: dict[str, Any], provider: str, column: str) -> float | None:
        return over(peer.get((*case(row), provider), {}).get(column), row[column])

    found: list[tuple[str, float | None, float, bool]] = []
    four = chosen(ours, n="4")
    for row in chosen(four, link="mapo", shape="sdxl", pred="fp32", target="bf16", shared="True"):
        # On the wall, Python is what counts at this size: benchmarks/README.md has what is left.
        for provider, of_wall, of_device in (("eager", 2.5, 6.0), ("compile", 1.3, 1.8)):
            what = f"SDXL, 4 pairs: {provider} / fastpref"
            found.append((f"{what}, wall", ratio(row, provider, "wall_us"), of_wall, True))
            found.append((f"{what}, device", ratio(row, provider, "device_us"), of_device, True))
    for row in chosen(four, shape="hunyuan720", pred="bf16", target="bf16"):
        what = f"Hunyuan, 4 pairs, {row['link']}, {'shared' if row['shared'] == 'True' else 'own'}"
        for way in ("fwd", "bwd"):
            share = over(row[f"{way}_gb_s"], row["copy_gb_s"])
            found.append((f"{what}: {way} bandwidth / copy", share, 0.92, True))
        bound = 1.2 if row["shared"] == "True" else 1.0
        gain = ratio(row, "compile", "device_us")
        found.append((f"{what}: compile / fastpref, device", gain, bound, True))
    extra = [row["extra_bytes"] for row in ours if row["extra_bytes"] is not None]
    found.append(("extra bytes, most", max(extra, default=None), 65536.0, False))
    floors = [
        over(r["device_us"], (r["floor_us"] or 0) + (r["two_launches_us"] or 0)) for r in ours
    ]
    most = max([f for f in floors if f is not None], default=None)
    found.append(("replay / (floor + two empty kernels), most", most, 1.3, False))
    big = [row for row in ours if row["bytes"] > 2**20 and row["device_us"] is not None]
    times = [[row["bytes"] for row in big], [row["device_us"] for row in big]]
    if len({*times[0]}) > 2 and len({*times[1]}) > 1:  # through two points there is always a line
        r2 = float(np.corrcoef(times)[0, 1] ** 2)
        found.append(("R^2 of device time by bytes", r2, 0.999, True))
    for row in [row for row in all_of_ours if row["family"] != "pairs"]:
        what = f"{row['link']}, {row['shape']}: compile / fastpref, device"
        found.append((what, ratio(row, "compile", "device_us"), 1.0, True))
    of_lists = [over(r["extra_bytes"], int(r["members"])) for r in chosen(rows, family="lists")]
    most = max([extra for extra in of_lists if extra is not None], default=None)
    found.append(("extra bytes of a list's sample, most", most, 16384.0, False))
    return [
        (what, figure, bound, lower) for what, figure, bound, lower in found if figure is not None
    ]


def floors(rows: list[dict[str, Any]]) -> list[str]:
    """Device time beside that of launches that only move the same bytes, case by case."""
    peer = {(*case(row), row["provider"]): row for row in rows}
    lines = []
    for row in chosen(rows, provider="fastpref"):
        floor = peer.get((*case(row), "floor"), {})
        parts = []
        for column in ("fwd_us", "bwd_us", "device_us"):
            ours, least = row[column], floor.get(column)
            if ours and least:
                parts.append(f"{column[:-3]} {ours:.1f} / {least:.1f} us = {ours / least:.2f}")
        if parts:
            name = f"{row['link']} {row['shape']} {row['n']} {row['pred']},{row['target']}"
            lines.append(f"fastpref / launches that only move memory, {name}: {', '.join(parts)}")
    return lines


def case(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("link", "shape", "n", "pred", "target", "shared"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Wall time against the bytes that must move, with the floor; and, from a GPU, the device time
    of forward and backward beside that of launches that only move memory."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name}: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    links = [link for link in ("mapo", "dpo_sigmoid") if chosen(rows, link=link)]
    if not links:
        return
    on_gpu = any(row["fwd_us"] for row in rows)
    figure, grid = plt.subplots(
        1 + on_gpu, len(links), figsize=(5 * len(links), 3.6 * (1 + on_gpu)), squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for column, link in enumerate(links):
        of_link = chosen(rows, link=link, shared="True")
        axes = grid[0][column]
        for name, (colour, marker) in STYLE.items():
            plot(axes, chosen(of_link, provider=name), "wall_us", marker, color=colour, label=name)
        floor = chosen(of_link, provider="fastpref")
        plot(axes, floor, "floor_us", "k--", label="floor: copy bandwidth")
        axes.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="wall time, us")
        axes.set_title(f"{link}: forward + backward")
        axes.legend(fontsize=8)
        if on_gpu:
            draw_bandwidth(of_link, grid[1][column])
    figure.suptitle(f"{rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot(axes: Any, rows: list[dict[str, Any]], column: str, style: str, **options: Any) -> None:
    points = sorted((row["bytes"], row[column]) for row in rows if row[column])
    if points:
        axes.plot(*zip(*points, strict=True), style, alpha=0.8, **options)


def draw_bandwidth(rows: list[dict[str, Any]], axes: Any) -> None:
    for name, colour in (("fastpref", STYLE["fastpref"][0]), ("floor", "k")):
        label = "launches that only move memory" if name == "floor" else name
        for way, marker in (("fwd", "o"), ("bwd", "s")):
            options = {"color": colour, "label": f"{label}: {way}", "markersize": 4}
            plot(axes, chosen(rows, provider=name), f"{way}_gb_s", marker, **options)
    if copy := [row["copy_gb_s"] for row in rows if row["copy_gb_s"]]:
        axes.axhline(copy[-1], color="k", linestyle="--", label="copy")
    axes.set(
        xscale="log", xlabel="bytes that must move", ylabel="GB/s on the device", ylim=(0, None)
    )
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plots and the table of benchmarks/README.md.")
    parser.add_argument("results", nargs="*", type=Path, help="only these, and only pictures")
    args = parser.parse_args(argv)
    paths = [
        table
        for path in args.results or [HERE / "results"]
        for table in (sorted(path.glob("*.csv")) if path.is_dir() else [path])
        if "wall_us" in table.read_text()[:500]
    ]
    tables = []
    for path in paths:
        rows = read(path)
        draw(rows, path.with_suffix(".png"))
        if any(row["fwd_us"] for row in rows):
            print("\n".join(floors(rows)))
            for what, figure, bound, lower in targets(rows):
                met = figure >= bound if lower else figure <= bound
                sign = ">=" if lower else "<="
                print(f"{'met ' if met else 'MISSED'} {what}: {figure:.4g} ({sign} {bound:g})")
    if args.results:
        return
    for path in paths:
        rows = read(path)
        tables.append(f"{table(rows)}\n\n![{rows[0]['device']}](results/{path.stem}.png)")
    readme = HERE / "README.md"
    text = readme.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(before + "\n" + "\n\n".join(tables) + "\n" + after)


if __name__ == "__main__":
    main()
