# SPDX-License-Identifier: Apache-2.0
"""The side of the package that vLLM loads: nothing else in it imports vLLM."""
