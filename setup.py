"""Packaging: `pip install -e .` is all there is to it.

irgrow/kernels and irgrow/passes are relative symbolic links to the top-level folders of those names; plain
`find_packages` follows them, so wheels and source archives hold ordinary folders inside `irgrow`, and no
package called `kernels` or `passes` is ever installed.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")
SUMMARY = "A graph-IR compiler for neural networks that grow while they train"

REQUIRED = [
    "torch>=2.11",
    "numpy>=1.26",
    "networkx>=3.0",
    "numba>=0.61",
    "scipy>=1.13",
    "safetensors>=0.4.5",
    "scikit-learn>=1.4",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    'triton>=3.6; platform_system == "Linux"',
]

EXTRAS = {
    "dev": ["pytest>=8", "hypothesis>=6.100", "pytest-xdist>=3.6", "ruff>=0.15", "mypy>=1.18"],
    # The libraries that bench/ measures irgrow against, in the same process.
    "bench": ["gromo>=0.1", "torch-pruning>=1.6"],
    # On Linux the core installs Triton; elsewhere GPU kernels need the community build.
    "gpu": [
        'triton>=3.6; platform_system == "Linux"',
        'triton-windows>=3.6; platform_system == "Windows"',
    ],
    "hf": ["transformers>=4.50"],
    # What `irgrow reproduce --full` reads the papers' data with; torchvision must be built for the torch that is there.
    "data": ["torchvision>=0.20", "datasets>=3"],
    "onnx": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
}

setup(
    name="irgrow",
    version="0.1.0",
    description=SUMMARY,
    long_description=README.read_text(encoding="utf-8") if README.exists() else SUMMARY,
    long_description_content_type="text/markdown",
    author="The irgrow developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["irgrow", "irgrow.*"]),
    package_data={"irgrow": ["py.typed"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["irgrow = irgrow.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
