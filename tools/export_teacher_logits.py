#!/usr/bin/env python3
"""`cupyep teacher`, under the name that it had first: a teacher's logits for a data set, for knowledge distillation."""

from __future__ import annotations

from cupyep.cli.teacher import teacher as main

if __name__ == "__main__":
    main()
