"""What `import groundingdino` costs and offers."""

import subprocess
import sys

import groundingdino

IMPORT = """
import sys, time, torch
start = time.process_time()
import groundingdino
print(time.process_time() - start)
print([name for name in ("timm", "transformers", "torch_npu", "torchvision", "nltk", "supervision", "gradio")
       if name in sys.modules])
groundingdino.load_model, groundingdino.Predictor
print([name for name in ("transformers", "nltk", "supervision", "gradio", "matplotlib") if name in sys.modules])
"""


def test_every_public_name_is_there():
    for name in groundingdino.__all__:
        assert getattr(getattr(groundingdino, name), "__name__", "MODEL_PRESETS") == name
    assert set(groundingdino.__all__) <= set(dir(groundingdino))
    assert not hasattr(groundingdino, "no_such_name")


def test_the_import_is_cheap_and_brings_no_heavy_package():
    output = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, with_package, with_predictor = output.stdout.splitlines()
    assert float(seconds) < 0.3
    assert with_package == "[]"
    assert with_predictor == "[]"
    assert output.stderr == ""
