import copy

import pytest

from ddengine.audited import audit_text, card_lines, verdicts

SPREAD = {"mean": 0.5123, "std": None, "values": [0.5123]}


def near(name, copies, share, ci95):
    sides = {"members": {"median": 0.12345}, "control": {"median": 0.2}}
    nearer = {"share": share, "counts": [1], "ci95": ci95, "p_value": 0.0421}
    return {"name": name, "images": 50, "copies": copies, "pool": 97, "distance": sides, "nearer": nearer}


def leak(name, tpr, ci95):
    accuracy = {"members": 0.9, "non_members": 0.8}
    row = {"name": name, "networks": 4, "members": 97, "non_members": 101, "auc": SPREAD, "advantage": SPREAD}
    return row | {"tpr": {**SPREAD, "mean": tpr, "ci95": ci95}, "accuracy": accuracy}


AUDIT = {
    "dataset": "digits",
    "seed": 3,
    "sizes": {"fit": 1293},
    "source_matches": True,
    "neighbours": {
        "draws": 5,
        "rows": [
            near("distilled", 2, 0.6, [0.45, 0.7]),
            near("random", 50, 0.7, [0.55, 0.8]),
            near("held_out", 0, 0.5, [0.4, 0.6]),
        ],
    },
    "membership": {
        "network": {"name": "convnet"},
        "recipe": {"steps": 500},
        "rows": [
            leak("distilled", 0.03, [0.02, 0.05]),
            leak("random_own", 0.45, [0.2, 0.7]),
            leak("teachers", 0.01, [0.0, 0.02]),
        ],
    },
    "note": "no guarantee of privacy is given.",
}


def changed(*path, to):
    audit = copy.deepcopy(AUDIT)
    place = audit
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return audit


def test_verdicts_say_what_was_found_beside_the_controls_and_the_interval():
    copies, nearer, members = verdicts(AUDIT)
    assert copies == "2 of 50 images are copies of training images (random real: 50 of 50)"
    assert "60.0 % are nearer" in nearer and "(random real: 70.0 %)" in nearer
    assert nearer.endswith("no difference from chance shown, 95 % interval 45.0 to 70.0")
    assert "3.0 % of members" in members and "own images: 45.0 %" in members
    assert members.endswith("more than by chance, 95 % interval 2.0 to 5.0")


@pytest.mark.parametrize(
    ("ends", "said"),
    [([0.1, 0.4], "less than by chance"), ([0.5, 0.6], "no difference"), ([0.51, 0.6], "more than by")],
)
def test_what_is_said_of_nearness_follows_the_interval(ends, said):
    assert said in verdicts(changed("neighbours", "rows", 0, "nearer", "ci95", to=ends))[1]


def test_other_data_than_the_sets_is_said_aloud():
    assert "not the data" in verdicts(changed("source_matches", to=False))[-1]
    assert len(verdicts(changed("source_matches", to=None))) == 3


def test_the_text_has_a_title_the_verdicts_aligned_tables_and_the_note():
    lines = audit_text(AUDIT).splitlines()
    assert lines[0] == "digits, privacy audit, seed 3" and lines[2:5] == verdicts(AUDIT)
    assert lines[-1] == AUDIT["note"]
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    table = lines[rule - 1 : rule + 4]
    assert len({len(line) for line in table}) == 1
    assert " ".join(table[2].split()) == "distilled 50 2 0.1235 0.2000 60.0 45.0 to 70.0 0.042"
    teachers = "stored teachers 97 0.512 1.0 0.0 to 2.0 0.512 90.0 / 80.0"
    assert teachers in [" ".join(line.split()) for line in lines]


def test_the_card_has_the_verdicts_as_a_list_and_tables_of_equal_columns():
    lines = card_lines(AUDIT)
    assert lines[0] == "## Privacy audit" and lines[2:5] == [f"- {said}" for said in verdicts(AUDIT)]
    tables = [line for line in lines if line.startswith("|")]
    assert [line.count("|") - 1 for line in tables] == [8] * 5 + [7] * 5
    assert lines[-1] == AUDIT["note"] and all("\n" not in line for line in lines)


def test_texts_of_a_file_become_no_markup_and_no_terminal_code():
    audit = changed("note", to="a\n<script>| b \x1b[31m")
    audit["neighbours"]["rows"][0]["name"] = "distilled"
    audit["membership"]["rows"][2]["name"] = "<b>|x"
    card, text = "\n".join(card_lines(audit)), audit_text(audit)
    assert "<" not in card and "\x1b" not in card + text
    assert card.splitlines()[-1] == "a\\n&lt;script>\\| b \\x1b[31m"
    assert "| &lt;b>\\|x | 97 |" in card
