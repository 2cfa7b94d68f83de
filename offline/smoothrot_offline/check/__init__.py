# SPDX-License-Identifier: Apache-2.0
"""Before a conversion: what it would do. After it: whether it is whole."""
