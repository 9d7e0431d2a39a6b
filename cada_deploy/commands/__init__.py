"""One file per command of `cada-deploy`; each holds a click command named `command`."""
