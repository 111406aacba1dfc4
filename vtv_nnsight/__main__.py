"""`python -m vtv_nnsight` is `vtv`."""

from vtv_nnsight.cli import main

if __name__ == "__main__":
    main()
