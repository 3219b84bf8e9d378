from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.errors import InputError
from flexmoe_jax.options import Admission, FitnessOptions, ModelOptions, Options, option


@dataclass(frozen=True)
class Baking(Options, section="oven"):
    """How a cake is baked."""

    heat: float = option(180.0, "degrees", above=20, most=300)
    minutes: int = option(40, "of the whole", least=1, most=90)
    loss: float = option(0.0, "of mass", least=0)
    share: float = option(0.5, "of the tray", above=0, below=1)
    offset: float = option(0.0, "of the thermometer", least=-5, most=5)
    drift: float = option(0.0, "of the same")
    fan: bool = option(False, "whether it is on")
    mode: str = option("bake", "where heat comes from", choices=("bake", "grill"))
    turns: int = option(1, "of grill", least=1, where=("mode", "grill"))
    racks: tuple[int, ...] | None = option(None, "in use; unset for all", kind=tuple)
    cake: object = option("any", "judged by who eats it", kind=object)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"heat": 20}, "oven.heat=20: choose a number in (20, 300]"),
        ({"heat": float("nan")}, "oven.heat=nan: choose a number in (20, 300]"),
        ({"minutes": 0}, "oven.minutes=0: choose 1 or more"),
        ({"minutes": 91}, "oven.minutes=91: choose at most 90"),
        ({"minutes": 2.0}, "oven.minutes=2.0: give a whole number"),
        ({"minutes": True}, "oven.minutes=True: give a whole number"),
        ({"minutes": None}, "oven.minutes=None: give a whole number"),
        ({"loss": -1.0}, "oven.loss=-1.0: choose a number of at least 0"),
        ({"loss": float("inf")}, "oven.loss=inf: choose a number of at least 0"),
        ({"share": 1}, "oven.share=1: choose a number in (0, 1)"),
        ({"offset": -6}, "oven.offset=-6: choose a number of at most 5, either side of 0"),
        ({"drift": float("inf")}, "oven.drift=inf: choose a finite number"),
        ({"fan": 1}, "oven.fan=1: give true or false"),
        ({"mode": "gril"}, "oven.mode=gril: did you mean grill? choose one of bake, grill"),
        ({"mode": "steam"}, "oven.mode=steam: choose one of bake, grill"),
        ({"mode": 3}, "oven.mode=3: give a text"),
        ({"mode": "grill", "turns": 0}, "oven.turns=0: choose 1 or more"),
        ({"turns": "two"}, "oven.turns=two: give a whole number"),
        ({"turns": 2**31}, "oven.turns=2147483648: choose at most 2147483647"),
        ({"racks": 3}, "oven.racks=3: give a tuple"),
    ],
)
def test_what_does_not_fit_is_refused(given, line):
    with pytest.raises(InputError) as refusal:
        Baking(**given)
    assert str(refusal.value).startswith(line)


def test_what_fits_is_taken():
    # A range counts where its option does; numbers may be NumPy's.
    Baking(heat=np.float32(300), minutes=np.int64(90), mode="bake", turns=0)
    Baking(racks=(1, 2), cake=["of", "any", "kind"])
    assert Baking.read({"oven.heat": 200, "car.heat": 3, **defaults("heat")}).heat == 200
    with pytest.raises(InputError, match=r"^oven\.heat=None: give a number"):
        Baking.read(defaults("heat"))


def defaults(but: str) -> dict[str, object]:
    return {Baking.field(n): rule.default for n, rule in Baking.rules().items() if n != but}


@given(st.floats(), st.sampled_from(["heat", "loss", "share", "offset"]))
def test_functions_without_a_record_refuse_the_same(value, name):
    lines = []
    for refuse in (lambda: Baking(**{name: value}), lambda: Baking.check(**{name: value})):
        try:
            refuse()
        except InputError as error:
            lines.append(str(error))
    assert len(lines) in (0, 2)
    assert len(set(lines)) < 2


def test_a_record_that_extends_another_has_its_section_and_options():
    @dataclass(frozen=True)
    class Oven(Baking):
        brand: str = "none"

    assert Oven.rules() == Baking.rules()
    with pytest.raises(InputError, match=r"^oven\.heat=0"):
        Oven(heat=0)


def test_options_that_do_not_go_together():
    with pytest.raises(InputError, match=r"^server\.noise_multiplier=1\.0: cut the updates too"):
        Admission(noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"^model\.top_k=9: choose at most model\.experts=8"):
        ModelOptions(top_k=9)
    with pytest.raises(InputError, match=r"^model\.widths=\(8, 0\): choose whole numbers"):
        ModelOptions(widths=(8, 0))
    with pytest.raises(InputError, match=r"^fitness\.score=3: give a text"):
        FitnessOptions(score=3)  # type: ignore[arg-type]


def test_options_are_known_without_jax():
    code = "import sys, experiments.configs.base, experiments.fields; print('jax' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
