"""What `/metrics` counted between two moments, read with Prometheus' own parser."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """Samples by name and labels; the label ``model`` is left out."""

    values: dict[Key, float]

    @classmethod
    def of(cls, url: str) -> Scrape:
        """Empty where the service shows no metrics."""
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return cls({})
        values: dict[Key, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = frozenset(pair for pair in sample.labels.items() if pair[0] != "model")
                values[sample.name, labels] = values.get((sample.name, labels), 0) + sample.value
        return cls(values)

    def since(self, before: Scrape) -> Scrape:
        """What was added, of counters and histograms."""
        return Scrape({k: value - before.values.get(k, 0.0) for k, value in self.values.items()})

    def gauge(self, name: str, **labels: str) -> float:
        """NaN where it is not shown."""
        return self.values.get((name, frozenset(labels.items())), float("nan"))

    def mean(self, histogram: str, **labels: str) -> float:
        """Sum over count; NaN where nothing was counted."""
        wanted = frozenset(labels.items())
        count = self.values.get((f"{histogram}_count", wanted), 0.0)
        return self.values.get((f"{histogram}_sum", wanted), 0.0) / count if count else float("nan")
