"""Starts the node: ros2 launch blip2edge_ros caption.launch.py bundle:=/path/to/bundle image:=/camera/image_raw."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node


def generate_launch_description() -> LaunchDescription:
    """Describes the launch: the node with its bundle, its picture topic and its largest rate of captions."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle"),
            DeclareLaunchArgument("image", default_value="/camera/image_raw"),
            DeclareLaunchArgument("max_fps", default_value="2.0"),
            Node(
                package="blip2edge_ros",
                executable="caption",
                parameters=[{"bundle": LaunchConfiguration("bundle"), "max_fps": LaunchConfiguration("max_fps")}],
                remappings=[("image", LaunchConfiguration("image"))],
            ),
        ]
    )
