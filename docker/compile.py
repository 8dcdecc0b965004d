"""Imports what a run imports, so that its byte code is in the image: no user of the image can write it there."""

import datasets
import jinja2
import junitparser
import matplotlib.pyplot
import nox
import pydantic
import pytest
import tensorboard
import torch._dynamo
import torch.distributed.run
import torch.utils.tensorboard
import transformers
import triton
import xdist
import yaml

for module in (datasets, jinja2, junitparser, matplotlib, nox, pydantic, pytest, tensorboard, torch, transformers):
    print(module.__name__, module.__version__ if hasattr(module, "__version__") else "")
print(triton.__name__, triton.__version__, xdist.__version__, yaml.__version__)
