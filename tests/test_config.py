"""Settings: ranges, one sentence for what is wrong, and run.yaml."""

import json

import pytest
import yaml

from persona_pruner.config import SculptConfig, read_run
from persona_pruner.errors import InputError


def test_defaults_survive_yaml_and_json():
    config = SculptConfig.of(ratio=0.5, questions=("a.json", "b.jsonl"), seed=3)
    for text in (yaml.safe_dump(config.dump()), json.dumps(config.dump())):
        assert SculptConfig.of(**yaml.safe_load(text)) == config
    assert SculptConfig().dump()["ratio"] == 0.25 and SculptConfig.of() == SculptConfig()


@pytest.mark.parametrize(
    "settings, why",
    [
        *(({"ratio": ratio}, "setting ratio: ") for ratio in (0, 1, -0.1, 1.5, float("nan"), "half", None)),
        ({"scope": "row"}, "setting scope: .*'layer' or 'global'"),
        ({"start": "luck"}, "setting start: .*'fisher'"),
        ({"loss": "mse"}, "setting loss: "),
        ({"steps": -1}, "setting steps: "),
        ({"steps": 1.5}, "setting steps: "),
        ({"seed": -1}, "setting seed: "),
        ({"held_out_questions": 0}, "setting held_out_questions: "),
        ({"budget": 10}, "setting budget: "),
        ({"lr": 0}, "setting lr: "),
        ({"questions": "a.json"}, "setting questions: "),
        ({"questions": (1,)}, r"setting questions\.0: "),
        ({"repair": "perhaps"}, "setting repair: "),
        ({"rato": 0.5}, "setting rato: Extra inputs"),
        ({"format": "packed", "scope": "global"}, "format packed needs scope layer"),
    ],
)
def test_refusals_are_one_sentence(settings, why):
    with pytest.raises(InputError, match=why) as caught:
        SculptConfig.of(**settings)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_settings_do_not_change():
    with pytest.raises(ValueError):
        SculptConfig().ratio = 0.5


def test_read_run(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*run\.yaml: No such file"):
        read_run(tmp_path)
    (tmp_path / "run.yaml").write_text("settings: {ratio: 0.5}\nmodel: x\n")
    assert read_run(tmp_path) == {"settings": {"ratio": 0.5}, "model": "x"}
    for text in ("a: [1", "!!python/object/apply:os.getcwd []", "just words", "- 1"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(InputError, match=r"run\.yaml is not") as caught:
            read_run(tmp_path)
        assert "\n" not in str(caught.value)
