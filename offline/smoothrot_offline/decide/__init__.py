# SPDX-License-Identifier: Apache-2.0
"""What is measured before a conversion: scales, clips, 8-bit layers, rotations."""
