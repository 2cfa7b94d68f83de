# SPDX-License-Identifier: Apache-2.0
"""Recipes by name: what each sets, and which one a model gets when nobody chooses."""
