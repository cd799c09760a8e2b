"""What the README's performance tables are made of; run as `python -m benchmarks NAME`."""
