import csv
import functools
import http.server
import threading
from pathlib import Path

import pytest

from vit_jax.checkpoints import names
from vit_jax.checkpoints.names import is_name, resolve
from vit_jax.errors import UserError
from vit_jax.models.variants import VARIANTS

pytestmark = pytest.mark.core

PUBLIC = "https://storage.googleapis.com/vit_models"
COLUMNS = (
    "name ds epochs lr aug wd do sd best_val final_val final_test adapt_ds adapt_lr adapt_steps "
    "adapt_resolution adapt_final_val adapt_final_test params infer_samples_per_sec filename "
    "adapt_filename"
).split()


def make_row(model, ds, aug, final_val, adapt_ds, resolution, adapt_final_val, wd="0.1"):
    """One row in the manner of index.csv."""
    prefix = model.replace("/", "_").replace("+", "_")
    file = f"{prefix}-{ds.split('_')[0]}-300ep-lr_0.001-aug_{aug}-wd_{wd}-do_0.0-sd_0.0"
    adapt_file = f"{file}--{adapt_ds}-steps_2k-lr_0.01-res_{resolution}"
    return dict(zip(COLUMNS, (
        model, ds, 300, 0.001, aug, wd, 0.0, 0.0, 0.99, final_val, 0.99, adapt_ds, 0.01, 2500,
        resolution, adapt_final_val, 0.99, 86567656, "NaN", file, adapt_file), strict=True))


ROWS = [
    make_row("B/16", "i21k", "medium1", 0.479, "imagenet2012", 224, 0.83),
    make_row("B/16", "i21k", "medium1", 0.479, "imagenet2012", 384, 0.85),
    make_row("B/16", "i21k", "medium1", 0.479, "cifar100", 384, 0.93),
    make_row("B/16", "i21k", "light1", 0.471, "imagenet2012", 384, 0.86, wd="0.03"),
    make_row("B/16", "i21k", "light1", "", "imagenet2012", 384, "NaN", wd="0.1"),
    make_row("B/16", "i1k", "strong1", 0.790, "imagenet2012", 384, 0.81),
    make_row("B/16", "i21k_30", "none", 0.500, "imagenet2012", 384, 0.87),
    make_row("B/8", "i21k", "medium2", 0.490, "imagenet2012", 224, 0.855),
    make_row("R26+S/32", "i21k", "light1", 0.44, "imagenet2012", 384, 0.838),
]


def write_index(path: Path, rows, columns=COLUMNS):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Address of a local mirror that holds the index, under the name with which it is asked for."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    write_index(folder / "augreg/index.csv", ROWS)
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("VIT_JAX_MODELS_URL", url + "/")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    yield url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name, address, variant", [
    ("imagenet21k:ViT-B_16", "imagenet21k/ViT-B_16.npz", "B/16"),
    ("imagenet21k:B/16", "imagenet21k/ViT-B_16.npz", "B/16"),
    ("imagenet21k:B/16-224", "imagenet21k/ViT-B_16.npz", "B/16"),
    ("imagenet21k:ViT-H_14.npz", "imagenet21k/ViT-H_14.npz", "H/14"),
    ("imagenet21k:vit_base_patch16_224", "imagenet21k/ViT-B_16.npz", "B/16"),
    ("imagenet21k:R50+B/16", "imagenet21k/R50%2BViT-B_16.npz", "R50+B/16"),
    ("imagenet21k:vit_base_r50_s16", "imagenet21k/R50%2BViT-B_16.npz", "R50+B/16"),
    ("imagenet21k+imagenet2012:ViT-B_16", "imagenet21k%2Bimagenet2012/ViT-B_16.npz", "B/16"),
    ("imagenet21k+imagenet2012:L/16-224", "imagenet21k%2Bimagenet2012/ViT-L_16-224.npz", "L/16"),
    ("imagenet21k+imagenet2012:vit_base_patch16_224",
     "imagenet21k%2Bimagenet2012/ViT-B_16-224.npz", "B/16"),
    ("imagenet21k+imagenet2012:vit_base_patch16_384",
     "imagenet21k%2Bimagenet2012/ViT-B_16.npz", "B/16"),
    ("sam:ViT-S_16", "sam/ViT-S_16.npz", "S/16"),
    ("gsam:ViT-B_32", "gsam/ViT-B_32.npz", "B/32"),
    ("gsam:ViT-B_32-gap-norep", "gsam/ViT-B_32.npz", "B/32"),
])
def test_public_addresses(name, address, variant, monkeypatch):
    monkeypatch.delenv("VIT_JAX_MODELS_URL", raising=False)
    remote = resolve(name)
    assert remote.url == f"{PUBLIC}/{address}"
    assert remote.file_name == address.split("/")[-1].replace("%2B", "+")
    assert (remote.family, remote.variant, remote.reason) == (name.split(":")[0], variant, "")
    assert is_name(name)


def test_every_listed_file_resolves_to_itself():
    for family, (_, files) in names.FILES.items():
        for file in files:
            remote = resolve(f"{family}:{file}")
            assert remote.file_name == f"{file}.npz" and remote.variant in VARIANTS
    assert set(names.AUGREG) < set(VARIANTS)


@pytest.mark.parametrize("name, messages", [
    ("imagenet21k:ViT-B_61", ["did you mean 'ViT-B_16'", "ViT-H_14"]),
    ("imagenet21k:S/16", ["not published", "The models of imagenet21k are"]),
    ("imagenet21k:vit_base_patch16_384", ["not published", "224 pixels"]),
    ("imagenet21k:vit_base_patch16_224.dino", ["not published"]),
    ("imagenet21k+imagenet2012:B/32-224", ["not published", "384 pixels"]),
    ("imagenet21k:", ["not published"]),
    ("sam:a\nb", ["not published"]),
    ("imagenet21:B/16", ["no family is called 'imagenet21'; did you mean 'imagenet21k'", "gsam"]),
    ("augreg:H/14", ["not published", "R26+S/32"]),
    ("augreg:B/16-384", ["augreg:B/16,dataset=imagenet2012,resolution=384"]),
    ("augreg:vit_base_patch16_384", ["resolution=384"]),
    ("augreg:B/16,agumentation=none", ["did you mean 'augmentation'", "stochastic_depth"]),
    ("augreg:B/16,resolution", ["resolution=VALUE"]),
    ("augreg:B/16,resolution=", ["resolution=VALUE"]),
    ("augreg:B/16,resolution=224,resolution=384", ["one value"]),
    ("augreg:B_16-i21k-300ep-lr_0.001", ["--DATASET-steps_Xk"]),
    ("augreg:../B_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", ["not name a file"]),
])
def test_mistakes_need_no_network(name, messages, monkeypatch):
    monkeypatch.setattr(names, "download", None)
    with pytest.raises(UserError) as error:
        resolve(name)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


UPSTREAM = "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"


@pytest.mark.parametrize("file", [
    UPSTREAM, f"{UPSTREAM}.npz", f"{UPSTREAM}--imagenet2012-steps_0k-lr_0.01-res_384",
    "Ti_16-i21k_30-30ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--oxford_iiit_pet-steps_2k-lr_0.003"
    "-res_224.npz",
])
def test_a_full_file_name_needs_no_network(file, monkeypatch):
    monkeypatch.setattr(names, "download", None)
    monkeypatch.delenv("VIT_JAX_MODELS_URL", raising=False)
    remote = resolve(f"augreg:{file}")
    assert remote.file_name == file.removesuffix(".npz") + ".npz"
    assert remote.url == f"{PUBLIC}/augreg/{remote.file_name}"
    assert remote.variant == {"R50": "R50+L/32", "Ti_": "Ti/16"}[file[:3]]


@pytest.mark.parametrize("model, row, reason", [
    ("B/16", 0, "final_val=0.479, the best of 2"),
    ("ViT-B_16", 0, "final_val=0.479, the best of 2"),
    ("vit_base_patch16_224", 0, "final_val=0.479, the best of 2"),
    ("B_16", 0, "final_val=0.479, the best of 2"),
    ("R26_S_32", 8, "final_val=0.44, the best of 1"),
    ("R26+ViT-S_32", 8, "final_val=0.44, the best of 1"),
    ("B/16,augmentation=light1", 3, "final_val=0.471, the best of 1"),
    ("B/16,weight_decay=3e-2", 3, "final_val=0.471, the best of 1"),
    ("B/16,pretraining=i1k", 5, "final_val=0.79, the best of 1"),
    ("B/16?pretraining=i21k_30&dropout=0", 6, "final_val=0.5, the best of 1"),
])
def test_best_pretrained_file(mirror, model, row, reason):
    remote = resolve(f"augreg:{model}", progress=False)
    assert remote.file_name == ROWS[row]["filename"] + ".npz"
    assert remote.url == f"{mirror}/augreg/{remote.file_name}"
    assert remote.reason == reason


@pytest.mark.parametrize("query, row", [
    ("dataset=imagenet2012", 3),
    ("resolution=384", 3),  # imagenet2012, not cifar100 with its higher accuracy
    ("resolution=224", 0),
    ("dataset=imagenet2012,resolution=384,augmentation=medium1", 1),
    ("dataset=cifar100", 2),
    ("resolution=384,pretraining=i1k", 5),
])
def test_best_fine_tuned_file(mirror, query, row):
    for separators in (",,", "?&"):
        name = "augreg:B/16" + separators[0] + query.replace(",", separators[1])
        remote = resolve(name, progress=False)
        assert remote.file_name == ROWS[row]["adapt_filename"] + ".npz"
        assert remote.reason.startswith(f"adapt_final_val={ROWS[row]['adapt_final_val']}, the")


@pytest.mark.parametrize("name, message", [
    ("augreg:B/16,dataset=cifar10", "with dataset=cifar10, only with dataset=cifar100 or "
     "imagenet2012; did you mean 'cifar100'"),
    ("augreg:B/8,resolution=384", "with resolution=384, only with resolution=224."),
    ("augreg:B/16,augmentation=light2", "only with augmentation=light1 or medium1"),
])
def test_values_that_the_index_does_not_have(mirror, name, message):
    with pytest.raises(UserError) as error:
        resolve(name, progress=False)
    assert message in str(error.value)


def test_the_index_is_downloaded_once(mirror, tmp_path, monkeypatch):
    first = resolve("augreg:B/16", cache_dir=tmp_path / "elsewhere", progress=False)
    (tmp_path / "mirror/augreg/index.csv").unlink()
    assert resolve("augreg:B/16", cache_dir=tmp_path / "elsewhere", progress=False) == first
    with pytest.raises(UserError, match="index.csv does not exist .* save it as"):
        resolve("augreg:B/16", progress=False)


@pytest.mark.parametrize("content, problem", [
    (b"", "lists no file of B/16"),
    (b"\xff\xfe\x00", "has no column 'filename'|codec"),
    (b"name,filename\nB/16,B_16-x\n", "has no column 'final_val'"),
    (b"<html>\n<p>x</p>", "has no column 'filename'"),
    (b"filename\nB_32-x\n", "lists no file of B/16"),
    (b'filename\n"' + b"x" * 200_000, "field larger"),
])
def test_a_broken_index_is_named(mirror, tmp_path, content, problem):
    (tmp_path / "mirror/augreg/index.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"index.csv cannot be read .*({problem}).*delete it"):
        resolve("augreg:B/16", progress=False)


def test_paths_are_not_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("model.npz", "C:\\models\\B_16.npz", "C:/models", "/data/a:b", "./sam:B", "a/b:c",
                 "https://host/file.npz", "gs://vit_models/sam/ViT-B_16.npz", "", ":", "~/x:y"):
        assert not is_name(text), text
    for text in ("augreg:B/16", "augerg:B/16", "imagenet21k+imagenet2012:B/16"):
        assert is_name(text)
    Path("sam:B").touch()
    Path("augreg:B").mkdir()
    Path("augreg:B/16").mkdir()
    assert not is_name("sam:B") and not is_name("augreg:B") and not is_name("augreg:B/16")
