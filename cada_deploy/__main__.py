"""`python -m cada_deploy` is `cada-deploy`."""

from cada_deploy.cli import main

main()
