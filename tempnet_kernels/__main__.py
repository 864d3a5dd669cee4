"""python -m tempnet_kernels, and the command tempnet-kernels."""

from tempnet_kernels.cli import app


def main():
    app()


if __name__ == "__main__":
    main()
