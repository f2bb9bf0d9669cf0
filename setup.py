"""What pyproject.toml cannot say: the recipes stand beside the package here, and within it once it is installed."""

from setuptools import find_namespace_packages, find_packages, setup

RECIPES = "jax_backtrack.shipped.configs"

setup(
    packages=[
        # Those without __init__.py hold data.
        *find_namespace_packages(include=["jax_backtrack", "jax_backtrack.*"], exclude=["*.__pycache__"]),
        RECIPES,
        *(f"{RECIPES}.{package}" for package in find_packages("configs")),
    ],
    package_dir={RECIPES: "configs"},
)
