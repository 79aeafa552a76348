"""The wire contracts: generated messages and services; `make proto` writes them."""
