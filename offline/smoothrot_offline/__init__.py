# SPDX-License-Identifier: Apache-2.0
"""Offline half of SmoothRot: a Hugging Face checkpoint in, SmoothRot INT4 safetensors out."""
