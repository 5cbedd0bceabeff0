"""`python -m megachat`: the command `megachat`."""

from megachat.commands.main import main

if __name__ == "__main__":
    main()
