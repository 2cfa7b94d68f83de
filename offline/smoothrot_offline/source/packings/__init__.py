# SPDX-License-Identifier: Apache-2.0
"""Sources whose weights are stored in fewer bits: what each packing says in ``config.json``, which
tensors stand for a weight, and what they are worth."""
