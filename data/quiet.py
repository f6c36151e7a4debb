"""
No words of libraries that the user can do nothing about. Import it before what imports transformers, which already warns.
"""

import logging
import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("PIL").setLevel(logging.ERROR)
