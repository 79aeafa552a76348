"""All benchmarks, one after another: `make bench`. Tables on the terminal, JSON in results/."""

from __future__ import annotations

import joblib_calls
import loop


def main() -> None:
    """Run them."""
    loop.main()
    joblib_calls.main([])
    print("\nThe server models are measured by: python benchmarks/server_model.py")


if __name__ == "__main__":
    main()
