"""The configuration: YAML that changes the defaults; every fault at once."""

from pathlib import Path

import pytest

import config
from blob_url import BlobUrl
from config import load
from faults import Fault


def test_a_dumped_configuration_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "data: {bag_dir: bags, fps: 15, action: {from: [{topic: /c, index: [0, 1]}], as: delta}}\n"
    )
    one = load(tmp_path / "a.yaml", ["training.lr=1e-4", "data.cameras={}", "output_dir=out"])
    (tmp_path / "b.yaml").write_text(config.dump(one))
    assert load(tmp_path / "b.yaml") == one
    assert one.training.lr == 1e-4 and one.data.fps == 15.0 and one.data.action.from_[0].index == (0, 1)
    assert one.data.bag_dir == tmp_path / "bags", "relative to the file"
    assert one.output_dir == Path.cwd() / "out", "relative to the working folder"


def test_bag_dir_takes_a_url_of_azure_blob(tmp_path: Path) -> None:
    url = "https://robots.blob.core.windows.net/data-sets/raw/day%201/"
    (tmp_path / "a.yaml").write_text(f"data: {{bag_dir: '{url}'}}\n")
    (tmp_path / "b.yaml").write_text(config.dump(load(tmp_path / "a.yaml")))
    for one in (load(tmp_path / "b.yaml"), load(tmp_path / "a.yaml"), load(None, [f"data.bag_dir={url}"])):
        place = one.data.bag_dir
        assert isinstance(place, BlobUrl) and place == url and one == load(tmp_path / "a.yaml")
        assert (place.account, place.container, place.prefix) == ("robots", "data-sets", "raw/day 1")
    local = BlobUrl("http://127.0.0.1:10000/robots/bags")
    assert (local.endpoint, local.account, local.prefix) == ("http://127.0.0.1:10000/robots", "robots", "")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://a.blob.core.windows.net", ["names no container", "ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX"]),
        ("https://a.blob.core.windows.net/c/bags", ["'c' is not a container's name"]),
        ("https://a.blob.core.windows.net/bags/../x", ["prefix '../x'"]),
        ("https://a.blob.core.windows.net/bags/a%2F..%2F..", ["is not a folder's name"]),
        ("https://a.dfs.core.windows.net/bags", ["use a.blob.core.windows.net"]),
        ("http://a.blob.core.windows.net/bags", ["unencrypted"]),
        ("azure://a/bags", ["azure://a is not Azure Blob"]),
        ("https://a.blob.core.windows.net:x/bags", ["is not a valid URL"]),
        ("https://a.blob.core.windows.net/bags/d?sp=rl&sig=hidden%3D", ["a SAS token", "AZURE_STORAGE_SAS_TOKEN"]),
        ("https://a:hidden@a.blob.core.windows.net/bags", ["before the @", "AZURE_STORAGE_KEY"]),
    ],
)
def test_a_wrong_url_or_one_with_a_secret_is_refused(tmp_path: Path, url: str, words: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{bag_dir: '{url}'}}\n")
    for path, overrides in ((tmp_path / "c.yaml", []), (None, [f"data.bag_dir={url}"])):
        with pytest.raises(Fault) as caught:
            load(path, overrides)
        said = str(caught.value)
        assert said.startswith("data.bag_dir: ") and all(word in said for word in words) and "hidden" not in said, said
    with pytest.raises(Fault) as caught:
        load(None, [url, f"data.bags={url}", f"data.bag_dir: {url}", f"data.fps={url}", f"data.bag_dir='{url}"])
    assert len(caught.value.args) == 5 and "hidden" not in str(caught.value), caught.value


def test_the_shipped_configurations_are_valid() -> None:
    folder = Path(config.__file__).parent
    shipped = load(folder / "config.yaml")
    assert shipped == config.Config(), "config.yaml repeats the defaults"
    assert load(folder / "demo.yaml").data.cameras


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("data: {camras: {}}", ["data.camras", "unknown", "data.cameras"]),
        ("training: {steps: many}", ["training.steps", "an integer", "many"]),
        ("training: {steps: true}", ["training.steps", "an integer"]),
        ("data: {fps: 0}", ["data.fps", "above 0"]),
        ("data: {image_size: [240]}", ["data.image_size", "list of 2"]),
        ("model: {n_heads: 7}", ["model.n_heads", "512"]),
        ("model: {chunk_size: 10}", ["model.n_action_steps", "100", "10"]),
        ("model: {dropout: 1.0}", ["model.dropout", "below 1"]),
        ("data: {state: [{topic: /j, joints: [a, a]}]}", ["data.state[0].joints", "duplicate"]),
        ("data: {state: []}", ["data.state", "at least one"]),
        ("data: {state: [{joints: [a]}]}", ["data.state[0].topic", "missing"]),
        ("data: {action: {as: relative}}", ["data.action.as", "absolute or delta", "relative"]),
        ("data: {action: {from: here}}", ["data.action.from", "next_state", "here"]),
        ("data: {cameras: {a.b: /c}}", ["data.cameras.a.b", "letters"]),
        ("data: {max_age_ms: {/nowhere: 5}}", ["data.max_age_ms./nowhere", "/joint_states"]),
        ("training: {lr: .nan}", ["training.lr", "finite"]),
        ("training: {device: gpu}", ["training.device", "cuda:N"]),
        ("training: {lr: 1, lr: 2}", ["lr", "duplicate"]),
        ("a: [", ["not valid YAML"]),
        ("- 1", ["mapping"]),
    ],
)
def test_a_fault_names_key_value_and_fix(tmp_path: Path, yaml: str, words: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(Fault) as caught:
        load(tmp_path / "c.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_faults_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {fps: -1, bags: x}\nmodel: {dim_model: 1.5}\n")
    with pytest.raises(Fault) as caught:
        load(tmp_path / "c.yaml", ["training.stepz=3", "training.lr"])
    assert len(caught.value.args) == 5


def test_a_retired_setting_is_ignored_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("training: {matmul_precision: high, steps: 3}\n")
    assert load(tmp_path / "c.yaml").training.steps == 3
    assert "training.matmul_precision is no longer a setting" in capsys.readouterr().out
    with pytest.raises(Fault):
        load(None, ["training.matmul_precision=high"])


def test_the_table_in_the_readme_matches_the_dataclasses() -> None:
    written = [
        line for line in (config.ROOT / "train/dataset/README.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert written == [
        f"| `{key}` | {f'`{default}`' if default else ''} | {reason} |" for key, default, reason in config.rows()
    ]


BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "yaml",
    [
        *("data: {bag_dir: [a, b]}", "training: {init_from: [a]}", "data: {state: {a: b}}", "data: {crop: {color: 1}}"),
        *(
            f"data: {{fps: !!{tag} x}}"
            for tag in ("timestamp", "bool", "int", "float", "set", "python/object:os.system")
        ),
        *("model: {n_heads: !!int ''}", "data: {fps: 2001-99-99}", "? {a: b}\n: c", "data: {cameras: {? [a] : b}}"),
        *("data: " + "[" * 3000, "data: " + "[" * 500 + "]" * 500, "a: &a [*a]", "data: &d {x: *d}"),
        *("training: {steps: " + "9" * 5000 + "}", 'output_dir: "a\\ud800"', 'data: {bag_dir: "\\udfff"}', "\0"),
        *(BOMB + "data: *a8", BOMB + "training: {steps: *a8}"),
        "{" + ", ".join(f"k{i}: 1" for i in range(50_000)) + "}",
        *("model: {dim_model: 1000000000000}", "data: {fps: 1000000}", "model: {n_encoder_layers: 100000000}"),
        *("training: {batch_size: 1000000000000}", "model: {chunk_size: 1000000000}"),
    ],
    ids=lambda yaml: yaml[:30].encode("unicode_escape").decode(),
)
def test_a_hostile_configuration_is_one_short_fault(tmp_path: Path, yaml: str) -> None:
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(Fault) as caught:
        load(tmp_path / "a.yaml")
    assert max(map(len, str(caught.value).splitlines())) < 500
