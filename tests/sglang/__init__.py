"""The engine against a real SGLang server on the CPU: `make test-sglang`."""
