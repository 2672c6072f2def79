"""Families of metrics under construction: values by name and labels, as prometheus_client wants them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .histograms import Histogram

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Families:
    """Iterate over it for the families. The first use of a name says which labels it has."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def __iter__(self) -> Iterator["Metric"]:
        return iter(self._families.values())

    def gauge(self, name: str, text: str, value: float, labels: Mapping[str, object]) -> None:
        """Adds a value that goes up and down."""
        self._family("Gauge", name, text, labels).add_metric(list(map(str, labels.values())), value)

    def counter(self, name: str, text: str, value: float, labels: Mapping[str, object]) -> None:
        """Adds a value that only goes up; Prometheus shows it as `name_total`."""
        self._family("Counter", name, text, labels).add_metric(list(map(str, labels.values())), value)

    def histogram(self, name: str, histogram: Histogram, labels: Mapping[str, object]) -> None:
        """Adds a histogram."""
        family = self._family("Histogram", name, histogram.text, labels)
        family.add_metric(list(map(str, labels.values())), histogram.buckets(), histogram.sum)

    def _family(self, kind: str, name: str, text: str, labels: Mapping[str, object]) -> Any:
        from prometheus_client import core

        if name not in self._families:
            family: Any = getattr(core, f"{kind}MetricFamily")
            self._families[name] = family(name, text, labels=list(labels))
        return self._families[name]
