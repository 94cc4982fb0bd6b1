"""The defects of mutation.py are there to be planted, and the operators of random_mutation.py change what they say."""

import ast

import pytest
from mutation import DEFECTS, ROOT, planted
from random_mutation import OPERATORS, PACKAGE, apply, changes, concerned, draw, modules


def mutants(source, operator):
    return [apply(source, change) for change in changes(source) if change.operator == operator]


@pytest.mark.parametrize(
    ("operator", "source", "wanted"),
    [
        ("arithmetic", "x = a + b * c", ["x = a - b * c", "x = a + b / c"]),
        ("arithmetic", "x -= (a  /  b)", ["x += a / b", "x -= (a * b)"]),
        ("comparison", "x = a < b <= c", ["x = a <= b <= c", "x = a < b < c"]),
        ("comparison", "x = a == b", ["x = a != b"]),
        ("term", "x = (a - b) * c", ["x = (a - b)", "x = (c)", "x = ((a)) * c"]),
        ("statement", "f(x)\na = 1\ns[0] = 1\nb.c = 2\na += 1", [
            "pass\na = 1\ns[0] = 1\nb.c = 2\na += 1",
            "f(x)\na = 1\npass\nb.c = 2\na += 1",
            "f(x)\na = 1\ns[0] = 1\npass\na += 1",
            "f(x)\na = 1\ns[0] = 1\nb.c = 2\npass",
        ]),
        ("number", "x = 0, 3, 0.5, True, 'é', 7", [
            "x = 1, 3, 0.5, True, 'é', 7",
            "x = 0, 6, 0.5, True, 'é', 7",
            "x = 0, 3, 1.0, True, 'é', 7",
            "x = 0, 3, 0.5, True, 'é', 14",
        ]),
        ("condition", "if a or b:\n    pass", ["if (not (a or b)):\n    pass"]),
        ("condition", "x = 1 if a else 2", ["x = 1 if (not (a)) else 2"]),
        ("arguments", "f(a, b, *c, d=1)", ["f(b, a, *c, d=1)"]),
        ("arguments", "f(a, a)", []),
        ("truth", "f(x=True)", ["f(x=False)"]),
        ("bound", "x[a:]", ["x[a + 1:]", "x[a - 1:]"]),
        ("bound", "range(1, n)", ["range(1 + 1, n)", "range(1 - 1, n)", "range(1, n + 1)", "range(1, n - 1)"]),
    ],
)  # fmt: skip
def test_operator(operator, source, wanted):
    assert mutants(source, operator) == wanted


@pytest.mark.parametrize(
    "source",
    [
        '"""Words, 1 + 1."""\nimport a\n',
        "def f(x: Literal[1, 2]) -> Literal[3]:\n    raise ValueError(1 + 1)\n",
        'x = f"{a + 1}"\n',
        "require(a, b + 1)\n",
    ],
)
def test_words_and_types_are_left_alone(source):
    assert [change for change in changes(source) if change.operator != "arguments" and change.new != "pass"] == []


def test_every_mutant_of_the_package_is_another_program():
    seen = set()
    for file in modules():
        source = (PACKAGE / file).read_text()
        tree = ast.dump(ast.parse(source))
        found = changes(source)
        for change in found[:: max(1, len(found) // 5)]:
            assert ast.dump(ast.parse(apply(source, change))) != tree, (file, change)
        seen |= {change.operator for change in found}
    assert seen == OPERATORS.keys()


def test_every_module_has_its_tests():
    assert {"phases.py", "memory/layout.py", "ops/conv.py", "learning/equilibrium.py", "training/statistics.py"} <= set(
        modules()
    )
    for file in modules():
        for name in concerned(file).split():
            assert (ROOT / "tests" / f"{name}.py").exists(), (file, name)


def test_draws_repeat_and_differ_among_themselves():
    mutants = draw(20, seed=1)
    assert mutants == draw(20, seed=1)
    assert len({(mutant.file, mutant.source) for mutant in mutants}) == 20
    assert all(mutant.diff.count("\n-") >= 1 and "test_random_networks" in mutant.tests for mutant in mutants)
    assert {mutant.file for mutant in draw(30, 0, "optim")} == {
        "optim.py",
        "ops/optimizer.py",
    }


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_hand_picked_defects_can_be_planted(defect):
    """Otherwise nobody sees, until the script is run, that a line was changed and its defect is planted no more."""
    assert planted(ROOT, defect) != (PACKAGE / defect.file).read_text()
    for name in defect.tests.split():
        assert (ROOT / "tests" / f"{name}.py").exists()
