"""Rules and alerts, checked by promtool and by a real Prometheus that scrapes two replicas."""

from __future__ import annotations

import subprocess
from typing import Any

import httpx
import pytest
import yaml

from tests.monitoring import DEPLOY, RULES, Prometheus, names_in, program
from tests.replicas import ReplicaProcess
from tests.waiting import wait_for

FOLDER = DEPLOY / "prometheus"
ALL_RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]


def promtool(*arguments: str, text: bytes = b"") -> str:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=FOLDER, input=text, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_promtool_takes_the_rules_and_the_example() -> None:
    assert f"{len(ALL_RULES)} rules found" in promtool("check", "rules", "rules.yaml")
    assert "is valid" in promtool("check", "config", "prometheus.yaml")


def test_the_operator_gets_the_same_rules() -> None:
    resource = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())
    assert resource["spec"] == yaml.safe_load(RULES.read_text())


def test_each_alert_fires_where_it_should_and_only_there() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    for alert in ALERTS:
        of_alert = [check for check in checks if check["alertname"] == alert["alert"]]
        assert any(check["exp_alerts"] for check in of_alert), f"{alert['alert']} never fires"
        assert any(not check["exp_alerts"] for check in of_alert), f"{alert['alert']} always fires"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    anchor = alert["alert"].lower()
    # Whole, for a pager: the host is to be replaced by the one that serves the file.
    runbook = f"https://fourstep.example.com/deploy/README.md#{anchor}"
    assert alert["annotations"]["runbook_url"] == runbook


def test_promtool_finds_no_fault_in_our_metrics(two_nodes: list[ReplicaProcess]) -> None:
    exposition = httpx.get(f"{two_nodes[0].url}/metrics", timeout=30).content
    assert promtool("check", "metrics", text=exposition) == ""


def test_two_replicas_are_scraped_and_add_up(prometheus: Prometheus) -> None:
    # A scrape that takes longer than its second leaves a gap until the next one.
    ready = "sum(fourstep_ready_replicas) == 2"
    wait_for(lambda: bool(prometheus.query(ready)), "two replicas that are ready")
    wait_for(lambda: len(prometheus.query("fourstep_engine_info")) == 2, "an engine of each")
    images = "sum(fourstep_images_total) >= 2 * 5"  # the last of them with the next scrape
    wait_for(lambda: bool(prometheus.query(images)), "five images of each")
    (series,) = prometheus.query("max(scrape_samples_scraped)")
    assert float(series["value"][1]) < 600, "series of one node with one model"


def test_every_rule_is_evaluated_over_metrics_that_exist(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    assert len(evaluated) == len(ALL_RULES)
    for rule in evaluated:
        assert rule["health"] == "ok", rule
    known = prometheus.names()
    for rule in ALL_RULES:
        if "record" in rule:
            assert prometheus.query(rule["record"]), rule["record"]
        assert names_in(rule["expr"]) <= known, rule
