"""Ray Serve config files: what is taken, what is named as left aside, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.ray_serve.machine import ServeError
from service.ray_serve.serve_config import ServeConfig

TWO = """
http_options: {port: 9000}
applications:
  - name: sketch
    route_prefix: /sketch
    import_path: service.ray_serve.deployment:build
    args: {model: demo-lcm, num_replicas: 2}
    runtime_env: {env_vars: {A: b}}
  - name: poster
    route_prefix: /poster
    import_path: service.ray_serve.deployment:build
    args: {model: demo-lcm, max_batch: 4}
"""


def config_of(folder: Path, text: str) -> ServeConfig:
    file = folder / "serve.yaml"
    file.write_text(text)
    return ServeConfig.from_file(file)


def test_two_applications_are_read(tmp_path: Path) -> None:
    config = config_of(tmp_path, TWO)
    sketch, poster = config.applications
    assert (sketch.name, sketch.route_prefix, sketch.max_replicas) == ("sketch", "/sketch", 2)
    assert poster.args == {"model": "demo-lcm", "max_batch": 4}
    assert config.ignored == ("http_options", "sketch.runtime_env")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "cannot be read"),
        ("applications: []", "has no applications"),
        ("applications: [{name: a, import_path: 'other:app'}]", "'other:app'.*serves 'service"),
        (TWO.replace("route_prefix: /poster", "route_prefix: poster"), "'poster'; it must begin"),
        (TWO.replace("route_prefix: /poster", "route_prefix: /sketch"), "serve.yaml: "),
        (TWO.replace("args: {model: demo-lcm, max_batch: 4}", "args: 3"), r"applications\.1\.args"),
        ("[]", "serve.yaml: "),
    ],
)
def test_what_is_refused_names_its_place_on_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ServeError, match=message) as caught:
        config_of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"absent\.yaml cannot be read: .*No such file"):
        ServeConfig.from_file(tmp_path / "absent.yaml")


def test_a_range_of_replicas_is_taken_as_on_a_cluster(tmp_path: Path) -> None:
    config = config_of(tmp_path, TWO.replace("num_replicas: 2", "max_replicas: 3"))
    assert [app.max_replicas for app in config.applications] == [3, 1]
    assert config.applications[0].settings.model == "demo-lcm"
