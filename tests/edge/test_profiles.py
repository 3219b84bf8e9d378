from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from flexmoe_jax.edge import TIERS, Profile, check_profile, read_tiers
from flexmoe_jax.errors import InputError

GOOD = Profile("sensor", memory=8e6, speed=2, down=37_500, up=46_875, availability=0.5)


def test_shipped_tiers_grow_from_sensor_to_gateway() -> None:
    assert list(TIERS) == ["sensor", "phone", "gateway"]
    sensor, phone, gateway = TIERS.values()
    for figure in ("memory", "speed", "down", "up"):
        assert getattr(sensor, figure) < getattr(phone, figure) < getattr(gateway, figure)


@pytest.mark.parametrize(
    ("figure", "value", "line"),
    [
        ("memory", 0, "edge.tiers.sensor.memory=0: give a number above 0 (inf for no limit)"),
        ("memory", True, "edge.tiers.sensor.memory=True: give a number"),
        ("speed", -1.0, "edge.tiers.sensor.speed=-1.0: give a number above 0 (inf for no limit)"),
        ("down", math.nan, "edge.tiers.sensor.down=nan: give a number above 0 (inf for no limit)"),
        ("up", "fast", "edge.tiers.sensor.up=fast: give a number"),
        (
            "availability",
            1.5,
            "edge.tiers.sensor.availability=1.5: give a share of rounds, from 0 to 1",
        ),
        (
            "availability",
            math.nan,
            "edge.tiers.sensor.availability=nan: give a share of rounds, from 0 to 1",
        ),
    ],
)
def test_impossible_figures_are_named(figure: str, value: Any, line: str) -> None:
    with pytest.raises(InputError) as caught:
        check_profile(GOOD._replace(**{figure: value}))
    assert str(caught.value) == line


def test_no_limits_are_allowed() -> None:
    ideal = Profile("ideal", math.inf, math.inf, math.inf, math.inf, 1)
    assert check_profile(ideal) == ideal


def test_own_tiers_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tiers.toml"
    file.write_text("[car]\nmemory = 1e9\nspeed = inf\ndown = 10\nup = 20\navailability = 0\n")
    assert dict(read_tiers(str(file))) == {"car": Profile("car", 1e9, math.inf, 10, 20, 0)}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "edge.tiers"),
        ("[car", "edge.tiers"),
        ("car = 3", "edge.tiers.car"),
        ("[car]\nmemory = 1e9", "edge.tiers.car"),
        ("[car]\nmemory=1\nspeed=1\ndown=1\nup=0\navailability=1", "edge.tiers.car.up"),
        ("[car]\nmemory=1\nspeed=1\ndown=1\nup=1\navailability=1\nwheels=4", "edge.tiers.car"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, field: str) -> None:
    file = tmp_path / "tiers.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_tiers(file)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"edge\.tiers=.*give a TOML file of tiers"):
        read_tiers(tmp_path / "none.toml")


@pytest.mark.parametrize("value", [10**400, 1e300, 5e-324, -(10**400)])
def test_figures_that_no_device_has_are_named(value: float) -> None:
    with pytest.raises(InputError, match=r"^edge\.tiers\.sensor\.speed=") as caught:
        check_profile(GOOD._replace(speed=value))
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("text", ["a = " + "[" * 9000, "[car]\nmemory = " + "9" * 5000])
def test_files_beyond_any_limit_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tiers.toml").write_text(text)
    with pytest.raises(InputError, match=r"^edge\.tiers"):
        read_tiers(tmp_path / "tiers.toml")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match=r"give a TOML file of tiers \(is a"):
            read_tiers(path)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.toml").write_text(
        "[car]\nmemory = 1\nspeed = 1\ndown = 1\nup = 1\navailability = 1\n"
    )
    assert list(read_tiers("~/t.toml")) == ["car"]
