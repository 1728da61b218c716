"""The picture of what :func:`normfuse.nn.monitor` recorded. Needs matplotlib (``pip install matplotlib``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from normfuse.errors import NormfuseError
from normfuse.files import Output

__all__ = ["PlotError", "plot_statistics", "read_statistics"]


class PlotError(NormfuseError):
    """A file of statistics cannot be read, or its picture cannot be drawn; the message is one line."""


_SERIES = ("step", "batch", "running", "ratio", "ratio_low", "ratio_high", "skips", "gradient", "finite")
_FORMATS = (".png", ".svg", ".pdf")


def read_statistics(path: str | Path) -> dict[str, Any]:
    """Read a file of :meth:`normfuse.nn.Monitor.save`.

    Args:
        path: of the file.

    Returns:
        What :meth:`normfuse.nn.Monitor.to_json` returned.

    Raises:
        PlotError: the file is not one.

    Example:
        >>> from normfuse.nn import UnifiedNorm, monitor
        >>> from normfuse.plotting import read_statistics
        >>> monitor(UnifiedNorm(8)).save("statistics.json")
        >>> sorted(read_statistics("statistics.json"))
        ['every', 'format', 'layers', 'version']
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlotError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlotError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "normfuse-statistics":
        raise PlotError(f"{path} holds no statistics of norms; write one with normfuse.nn.monitor(model).save(path)")
    if content.get("version") != 1:
        raise PlotError(f"{path} has version {content.get('version')!r}; this normfuse reads version 1")
    layers = content.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise PlotError(f"{path} holds no layers")
    for name, series in layers.items():
        lists = isinstance(series, dict) and all(isinstance(series.get(field), list) for field in _SERIES)
        if not lists or len({len(series[field]) for field in _SERIES}) != 1:
            raise PlotError(f"{path}: the record of layer {name!r} is incomplete")
    return content


def plot_statistics(statistics: str | Path | dict[str, Any], out: str | Path) -> Path:
    """Draw batch and running statistics, their ratio, the gradient statistic and skipped steps, one row per layer.

    Args:
        statistics: what :meth:`normfuse.nn.Monitor.to_json` returned, or a file of :meth:`~normfuse.nn.Monitor.save`.
        out: the picture to write; its ending selects the format: .png, .svg or .pdf.

    Returns:
        ``out`` as a path.

    Raises:
        PlotError: ``statistics`` is not such a file, ``out`` cannot be written or has an unknown ending, or matplotlib
            is missing.

    Example:
        >>> from normfuse.nn import UnifiedNorm, monitor
        >>> from normfuse.plotting import plot_statistics
        >>> model = UnifiedNorm(8)
        >>> with monitor(model, every=1) as watch:
        ...     _ = model(torch.randn(4, 8))
        >>> plot_statistics(watch.to_json(), "statistics.svg").name
        'statistics.svg'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("drawing needs matplotlib: pip install matplotlib") from error
    out = Path(out)
    if out.suffix.lower() not in _FORMATS:
        raise PlotError(f"{out} ends in {out.suffix!r}; give one of {', '.join(_FORMATS)}")
    output = Output(out, reads=[] if isinstance(statistics, dict) else [statistics], error=PlotError)
    layers = (statistics if isinstance(statistics, dict) else read_statistics(statistics))["layers"]
    figure = Figure(figsize=(12, 1 + 2 * len(layers)), layout="constrained")
    for axes, (name, series) in zip(figure.subplots(len(layers), 3, squeeze=False), layers.items(), strict=True):
        _draw_layer(axes, name, series)
    with output:
        figure.savefig(output.staged, dpi=110, format=out.suffix[1:].lower())
        output.publish()
    return out


def _draw_layer(axes: Any, name: str, series: dict[str, list[Any]]) -> None:
    values = {field: [math.nan if v is None else v for v in column] for field, column in series.items()}
    step = values["step"]
    axes[0].plot(step, values["batch"], label="batch", linewidth=1)
    axes[0].plot(step, values["running"], label="running", linewidth=1.5)
    axes[0].set_ylabel(name)
    axes[0].set_title("mean over channels", fontsize=9)
    axes[0].legend(fontsize=7)
    axes[1].fill_between(step, values["ratio_low"], values["ratio_high"], alpha=0.4)
    axes[1].plot(step, values["ratio"], linewidth=1.5)
    axes[1].axhline(1, color="black", linewidth=0.6)
    axes[1].set_title("batch over running: middle and range over channels", fontsize=9)
    axes[2].plot(step, values["gradient"], linewidth=1)
    axes[2].set_title(f"size of the gradient statistic; {values['skips'][-1] if step else 0} skips", fontsize=9)
    for each in axes[:2]:
        if any(v > 0 for v in values["batch"]):
            each.set_yscale("log")
    for index, finite in enumerate(values["finite"]):
        if not finite:
            for each in axes:
                each.axvline(step[index], color="red", linewidth=0.8)
