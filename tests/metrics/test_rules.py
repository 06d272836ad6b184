"""The alert rules: promtool takes them, and each fires when it should and not before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metrics.charts import RULES, rules
from tests.metrics.prometheus import promtool

_LABELS = 'namespace="n",application="a"'
Values = Mapping[str, str]
"""Samples of each series, one a minute, in promtool's notation; the series' own labels in braces."""

FIRES: dict[str, tuple[Values, int, Mapping[str, str]]] = {
    "ExpertMeshNotHealthy": ({"healthy": "1x5 0x10"}, 11, {}),
    "ExpertMeshControllerAway": ({"engine_running": "0x15", "healthy": "1x3 stale _x11"}, 10, {}),
    "ExpertMeshExpertsMissing": ({"missing_experts": "0x4 7x10"}, 7, {}),
    "ExpertMeshNoRoomForExperts": ({"unplaced_copies": "0x4 7x10"}, 10, {}),
    "ExpertMeshRequestsFail": (
        {'requests_total{outcome="ok"}': "0+60x30", 'requests_total{outcome="unavailable"}': "0x10 0+6x20"},
        25,
        {},
    ),
    "ExpertMeshStreamsBreak": (
        {'sequences_total{outcome="ok"}': "0+60x30", 'sequences_total{outcome="failed"}': "0x10 0+6x20"},
        25,
        {},
    ),
    "ExpertMeshTurnsRequestsAway": (
        {'requests_total{outcome="ok"}': "0+60x40", 'requests_total{outcome="limited"}': "0x10 0+20x30"},
        30,
        {},
    ),
    "ExpertMeshSlowFirstToken": (
        {
            'ttft_seconds_bucket{le="1.0"}': "0+60x10 600x30",
            'ttft_seconds_bucket{le="10.0"}': "0+60x10 600x30",
            'ttft_seconds_bucket{le="30.0"}': "0+60x40",
            'ttft_seconds_bucket{le="+Inf"}': "0+60x40",
        },
        30,
        {},
    ),
    "ExpertMeshRequestsWait": ({'engine_waiting{replica="r"}': "0x5 9x20"}, 20, {}),
    "ExpertMeshKVCacheFull": ({'kv_use{replica="r"}': "0.5x5 0.99x20"}, 20, {}),
    "ExpertMeshMembersWanting": (
        {'wanted_members{side="experts"}': "2x5 4x25", 'members{side="experts",state="ready"}': "2x30"},
        25,
        {"side": "experts"},
    ),
    "ExpertMeshMembersKeepDying": (
        {'lost_members_total{side="attention"}': "0x5 0+1x20"},
        20,
        {"side": "attention"},
    ),
    "ExpertMeshReplicaFailovers": ({'request_failovers_total{way="resubmit"}': "0x5 0+5x20"}, 20, {}),
    "ExpertMeshFramesFailOver": ({'dispatch_failovers_total{why="overdue"}': "0x5 0+30x30"}, 25, {}),
    "ExpertMeshReplicaBehind": ({"placement_epoch": "5x5 6x20", 'table_epoch{replica="r"}': "5x25"}, 15, {}),
    "ExpertMeshShardsBusy": ({'shard_busy{shard="s"}': "0.5x5 0.95x30"}, 25, {}),
    "ExpertMeshUneven": ({"balancedness": "0.9x5 0.5x50"}, 40, {}),
    "ExpertMeshMovesAbandoned": ({'moves_total{outcome="abandoned"}': "0x5 0+1x30"}, 30, {}),
    "ExpertMeshKVStoreAway": (
        {
            'kv_store_servers{replica="r",breaker="open"}': "0x5 1x20",
            'kv_store_servers{replica="r",breaker="closed"}': "1x5 0x20",
        },
        15,
        {},
    ),
    "ExpertMeshKVStoreUnsound": ({'kv_store_loads_total{result="corrupt"}': "0x5 0+1x20"}, 10, {}),
}
"""For each alert: what makes it fire, at which minute it has, and the labels that it has then beside the mesh's. At
minute 4 all is still well."""


def test_promtool_takes_the_rules() -> None:
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", RULES)


def test_every_alert_is_tried() -> None:
    assert FIRES.keys() == rules().keys()


@pytest.mark.parametrize("alert", FIRES)
def test_it_fires_when_it_should(alert: str, tmp_path: Path) -> None:
    values, minute, labels = FIRES[alert]
    series = []
    for name, samples in values.items():
        name, _, own = name.partition("{")
        matchers = ",".join(filter(None, [_LABELS, own.removesuffix("}")]))
        series.append({"series": f"ray_expertmesh_{name}{{{matchers}}}", "values": samples})
    (rule,) = [
        r for group in yaml.safe_load(RULES.read_text())["groups"] for r in group["rules"] if r["alert"] == alert
    ]
    case = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": f"{at}m",
                "exp_samples": [{"labels": "{}", "value": value}],
            }
            for at, value in ((4, 0), (minute, 1))
        ],
    }
    promtool_test(case, tmp_path)
    # And as people get it: with its labels, and texts whose templates are right.
    fired = {"namespace": "n", "application": "a", "severity": rule["labels"]["severity"], **labels}
    told = promtool_fails(
        {
            **case,
            "promql_expr_test": [],
            "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}],
        },
        tmp_path,
    )
    assert all(f'{name}="{value}"' in told for name, value in fired.items())
    assert "a: " in told
    assert "{{" not in told
    assert "error" not in told.lower()


def _write(case: dict[str, Any], folder: Path) -> Path:
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
    return file


def promtool_test(case: dict[str, Any], folder: Path) -> None:
    """Fails the test unless promtool finds what the case says."""
    promtool("test", "rules", _write(case, folder))


def promtool_fails(case: dict[str, Any], folder: Path) -> str:
    """What promtool found instead of what the case says."""
    with pytest.raises(AssertionError) as failure:
        promtool_test(case, folder)
    return str(failure.value)
