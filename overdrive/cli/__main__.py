"""`python -m overdrive.cli`: the command without installing the package."""

from overdrive.cli import main

if __name__ == "__main__":
    main()
