from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "federation.md"


def test_the_federation_of_the_page_learns(capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    known: dict[str, Any] = {}
    exec(compile("\n".join(examples), str(PAGE), "exec"), known)
    assert known["evaluation"].personal_accuracy.shape == (2,)
    said = dict(re.findall(r"(\w+): (\d+)% of the test set", capsys.readouterr().out))
    assert said.keys() == {"curious", "flex"}
    assert min(map(int, said.values())) > 80
