"""Builds the ROS 2 package; colcon runs this file."""

from setuptools import setup

NAME = "blip2edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/caption.launch.py"]),
    ],
    install_requires=["setuptools"],
    license="Apache-2.0",
    description="Captions the pictures of a topic with a bundle of blip2edge.",
    entry_points={"console_scripts": [f"caption = {NAME}.node:main"]},
)
