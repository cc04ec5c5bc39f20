# Stands in for NGC's PyTorch image, which is too large for a test: torch for the CPU, and the same traps for pip.
# test_image.py builds it. rootfs.tar is Debian with python and pip, and with a PyYAML that belongs to dpkg.

FROM scratch AS unconstrained
ADD rootfs.tar /
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PIP_BREAK_SYSTEM_PACKAGES=1
COPY standin_torchvision.py /opt/
RUN mkdir -p /etc/pip && touch /etc/pip/constraint.txt \
    && pip install -q --no-cache-dir torch==2.13.0 numpy==1.26.4 pillow==11.3.0 tqdm==4.67.1 tensorboard==2.16.2 \
    && pip install -q --no-cache-dir --no-deps torchvision==0.28.0 \
    && python /opt/standin_torchvision.py

FROM unconstrained AS constrained
RUN pip list --format freeze > /etc/pip/constraint.txt
