from setuptools import setup


setup(
    name="adversarial-flow",
    version="0.1.0.dev0",
    description="Adversarial Flow Models: one-step and few-step image generators, with accelerate and diffusers",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The folders at the top level are the package's sub-packages: nothing named `models` or `utils` gets installed.
    package_dir={
        "adversarial_flow": "src/adversarial_flow",
        "adversarial_flow.models": "models",
        "adversarial_flow.pipelines": "pipelines",
        "adversarial_flow.utils": "utils",
    },
    packages=["adversarial_flow", "adversarial_flow.models", "adversarial_flow.pipelines", "adversarial_flow.utils"],
    install_requires=[
        "accelerate>=1.1",
        "clean-fid>=0.1.35",
        "datasets>=3.0",
        "diffusers>=0.39",
        "huggingface_hub>=0.30",
        "matplotlib>=3.7",
        "numpy>=1.26",
        "Pillow>=9.5",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "tensorboard>=2.14",
        "torch>=2.5",
        "torchvision>=0.20",
        "tqdm>=4.66",
        "transformers>=4.45",
    ],
    extras_require={
        "test": ["pytest>=8.0", "ruff>=0.8", "nbclient>=0.10", "ipykernel>=6.29"],
        "wandb": ["wandb>=0.17"],
        "dev": ["pytest>=8.0", "ruff>=0.8", "nbclient>=0.10", "ipykernel>=6.29", "wandb>=0.17"],
    },
)
