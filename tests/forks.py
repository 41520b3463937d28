"""Processes that begin with everything imported: a server imports once, and commands are forked.

`run` and `Popen` are those of subprocess, and what they start is a real process with its own pid,
streams, folder, variables, signals and exit code. A command `[sys.executable, …]` with a script, `-c`
or `-m` is forked; any other, and one that sets what Python or a library reads as it starts, begins
afresh, as it does where there is no server. The server runs no operation of PyTorch and has one
thread, so that a fork of it can do anything. `tests/test_forks.py` compares forks with fresh processes.
"""
import atexit, gc, importlib, io, json, os, pickle, runpy, select, signal, socket, struct, subprocess, sys
import tempfile, threading, time, types, warnings, weakref
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parents[1]
libraries = ('torch', 'torch._dynamo', 'torchvision', 'fastai.vision.all', 'timm', 'matplotlib.pyplot',
             'sklearn', 'scipy.stats', 'cv2', 'safetensors.torch', 'yaml', 'tyro', 'nbdev.test',
             'nbdev.export', 'nbconvert', 'matplotlib_inline.backend_inline', 'pytest')
known = 'SIMCLR_FORKS'                              # the variable that says where the server listens
nested = 'SIMCLR_NESTED'                            # one by which subprocess in a fork forks as well
read_at_start = ('PYTHON', 'LANG', 'LC_', 'LD_', 'MPL', 'HF_', 'MKL_', 'OPENBLAS_', 'TORCH_LOGS',
                 'TORCHDYNAMO', 'TORCHINDUCTOR', 'PYTORCH_')


def modules():
    "What the server imports: the libraries, and every module of the package."
    if 'SIMCLR_PRELOAD' in os.environ: return os.environ['SIMCLR_PRELOAD'].split()
    files = sorted((root/'simclr_nb').rglob('*.py'))
    paths = [f.relative_to(root).with_suffix('') for f in files if not f.name.startswith('_')]
    return [*libraries, *('.'.join(path.parts) for path in paths)]


# Who asks

spent = []                                          # processor seconds of each fork that has ended

class Popen(subprocess.Popen):
    "A process that is forked from the server where that is the same as starting it."
    asked = None                                    # the connection to the server, if that forked it

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        (_, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _,
         session, *_) = more
        pipes = p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        words = [] if isinstance(args, (str, bytes, os.PathLike)) else [os.fsdecode(a) for a in args]
        variables = os.environ if env is None else {os.fsdecode(k): os.fsdecode(v) for k, v in env.items()}
        at_once = words[1:2] == ['-u']              # as torchrun calls it
        if at_once: del words[1]
        python = len(words) > 1 and words[0] == sys.executable
        python = python and (words[1] in ('-c', '-m') or words[1][:1] != '-')
        if python and known in os.environ and not (executable or preexec_fn or pass_fds or shell):
            request = dict(args=words[1:], at_once=at_once, cwd=os.path.abspath(os.fsdecode(cwd or '.')),
                           env=dict(variables), session=session, group=os.getpgrp(), asker=os.getpid())
            streams = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
            self.asked, pid = ask(request, streams)
            if pid:
                self.pid, self._child_created = pid, True
                return self._close_pipe_fds(*pipes)
            self.asked = None
        super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)

    def _status(self, wait):
        "(pid, status) as os.waitpid gives them."
        if not wait and not select.select([self.asked], [], [], 0)[0]: return 0, 0
        answer = self.asked.recv(struct.calcsize('id'))
        status, seconds = struct.unpack('id', answer) if answer else (signal.SIGKILL, 0.)
        spent.append(seconds)
        return self.pid, status

    def _internal_poll(self, *args, **kwargs):
        if self.asked is None: return super()._internal_poll(*args, **kwargs)
        if self.returncode is None:
            pid, status = self._status(False)
            if pid: self._handle_exitstatus(status)
        return self.returncode

    def _try_wait(self, flags):
        if self.asked is None: return super()._try_wait(flags)
        return self._status(not flags & os.WNOHANG)

    def _handle_exitstatus(self, *args, **kwargs):
        super()._handle_exitstatus(*args, **kwargs)
        if self.asked: self.asked.close()


def ask(request, fds):
    "The connection to the server, and the pid of its fork; 0 where a fresh process is better."
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[known])
    data = json.dumps(request).encode()
    socket.send_fds(server, [struct.pack('I', len(data))], fds)
    server.sendall(data)
    answer = server.recv(4)
    if len(answer) < 4: raise RuntimeError('the fork server is gone')
    return server, struct.unpack('i', answer)[0]


def run(args, *, input=None, capture_output=False, timeout=None, check=False, **kwargs):
    "`subprocess.run`, forked."
    if input is not None: kwargs['stdin'] = subprocess.PIPE
    if capture_output: kwargs |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(args, **kwargs) as process:
        try: out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check: done.check_returncode()
    return done


@contextmanager
def server():
    "While it is on, `run` and `Popen` fork; where a server is known already, that one serves."
    if known in os.environ or not sys.platform.startswith('linux'):
        yield
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f'{folder}/s'
        listener.bind(address)
        listener.listen(64)
        one_thread = dict(OMP_NUM_THREADS='1', JE_ARROW_MALLOC_CONF='background_thread:false')
        env = {**os.environ, **one_thread, 'CUDA_VISIBLE_DEVICES': ''}
        fd = listener.fileno()
        command = [sys.executable, __file__, str(fd)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, pass_fds=[fd])
        listener.close()
        os.environ[known] = address
        try: yield
        finally:
            del os.environ[known]
            process.stdin.close()                   # by which it knows that it may go
            process.wait()


def stand_in(folder):
    "A program that is forked where a shell calls it as Python, and that hands on the signals it gets."
    path = Path(folder)/'python'
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} stand-in "$@"\n')
    path.chmod(0o755)
    return path


def be_another(args):
    "Start a command, and end as it ends."
    process = Popen([sys.executable, *args])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    if (code := process.wait()) < 0: end_by(-code)
    sys.exit(code)


def end_by(number):
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Process:
    "multiprocessing's, but for `parent_process()`: a program of its own that calls a function found by its name."
    call = """if 1:
        import pickle, sys
        sys.path[:] = pickle.load(sys.stdin.buffer)
        function, args, kwargs = pickle.load(sys.stdin.buffer)
        function(*args, **kwargs)"""

    def __init__(self, target, args=(), kwargs=None):
        self.work = pickle.dumps(sys.path) + pickle.dumps((target, args, kwargs or {}))

    def start(self):
        self.popen = Popen([sys.executable, '-c', self.call], stdin=subprocess.PIPE)
        with self.popen.stdin as f: f.write(self.work)
        self.pid, self.kill, self.terminate = self.popen.pid, self.popen.kill, self.popen.terminate

    @property
    def exitcode(self): return self.popen.poll()

    def is_alive(self): return self.exitcode is None

    def join(self, timeout=None):
        try: self.popen.wait(timeout)
        except subprocess.TimeoutExpired: pass


def together(target, n, args, seconds):
    "Run target(rank, *args) in n processes; an error where one of them fails, or takes longer than this."
    processes = [Process(target, (rank, *args)) for rank in range(n)]
    try:
        for p in processes: p.start()
        end = time.monotonic() + seconds                            # the server has its imports behind it
        while any(p.is_alive() for p in processes):
            assert time.monotonic() < end, f'{n} processes were not done after {seconds} s'
            if any(p.exitcode for p in processes): break
            time.sleep(.02)
        assert [p.exitcode for p in processes] == [0]*n, 'one of the processes has failed'
    finally:
        for p in processes:
            if hasattr(p, 'popen'): p.kill(), p.join()


# The server

def receive(connection):
    "A request and its three streams."
    head, fds, *_ = socket.recv_fds(connection, 4, 3)
    size, data = struct.unpack('I', head)[0], b''
    while len(data) < size: data += connection.recv(size - len(data))
    return json.loads(data), fds


def begins_afresh(request, before):
    "Does what is asked for depend on how a process begins, or on where it belongs?"
    if os.getsid(request['asker']) != os.getsid(0) and not request['session']: return True
    env, gpus = request['env'], [f'/dev/{name}' for name in ('nvidiactl', 'kfd', 'dxg')]
    if env.get('CUDA_VISIBLE_DEVICES') != '' and any(map(os.path.exists, gpus)): return True
    if set(paths(env)) - {str(root)} != set(paths(before)) - {str(root)}: return True
    read = {k for k in (*env, *before) if k.startswith(read_at_start)} - {'PYTHON', 'PYTHONPATH'}
    return any(env.get(k, '') not in (before.get(k, ''), os.environ.get(k, '')) for k in read)  # imports set some


def paths(env): return [path for path in env.get('PYTHONPATH', '').split(os.pathsep) if path]


def serve(listener, usable, before):
    "Fork for everyone who asks, until whoever started this is gone; returns in the forks only."
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for those who ask
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    asked = {}                                      # connections by pid
    while True:
        ready = select.select([listener, woken, 0], [], [])[0]
        if 0 in ready: os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            for pid, status, seconds in ended():
                with asked.pop(pid) as connection: tell(connection, 'id', status, seconds)
        if listener in ready:
            connection, _ = listener.accept()
            request, fds = receive(connection)
            possible = usable and not begins_afresh(request, before)
            pid = os.fork() if possible else 0
            if possible and not pid:
                for c in (listener, connection, *asked.values()): c.close()
                signal.set_wakeup_fd(-1)
                for fd in (woken, wakes): os.close(fd)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return request, fds
            for fd in fds: os.close(fd)
            tell(connection, 'i', pid)
            if pid: asked[pid] = connection
            else: connection.close()


def ended():
    "The pids, statuses and processor seconds of forks that have ended."
    while True:
        try: pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError: return
        if not pid: return
        yield pid, status, used.ru_utime + used.ru_stime


def tell(connection, form, *numbers):
    try: connection.sendall(struct.pack(form, *numbers))
    except OSError: pass                            # it has gone


# A fork

def settle(request, fds, before):
    "Make this fork what a process is that has just begun."
    if request['session']: os.setsid()
    else: os.setpgid(0, request['group'])
    for fd, place in zip(fds, range(3)):
        os.dup2(fd, place)
        os.close(fd)
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    for fd, name in enumerate(('stdin', 'stdout', 'stderr')):
        old = getattr(sys, name)
        through = request['at_once'] or old.write_through
        lines = not through and (name == 'stderr' or os.isatty(fd))
        raw = open(fd, 'wb' if fd else 'rb', 0 if fd and through else -1, closefd=False)
        new = io.TextIOWrapper(raw, old.encoding, old.errors, None, lines, through)
        setattr(sys, name, new)
        setattr(sys, f'__{name}__', new)
    sys.path[1:] = paths(request['env']) + [path for path in sys.path[1:] if path not in before]
    importlib.invalidate_caches()
    for made in weakref.finalize._registry.values(): made.atexit = False   # the server's folders are not ours to delete
    if 'numpy' in sys.modules: sys.modules['numpy'].random.seed()
    threads = os.environ.get('OMP_NUM_THREADS', '')
    threads = int(threads) if threads.isdigit() else len(os.sched_getaffinity(0))
    if torch := sys.modules.get('torch'):
        if threads != 1: torch.set_num_threads(threads)
        if torch.initial_seed() != 67280421310721:  # with which each process of older versions begins
            torch.default_generator.seed()
    if 'cv2' in sys.modules: sys.modules['cv2'].setNumThreads(threads)


def become(args):
    "What Python does with its arguments."
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    kind, *rest = args
    if kind == '-c':
        sys.argv, sys.path[0] = ['-c', *rest[1:]], ''
        exec(compile(rest[0], '<string>', 'exec'), main.__dict__)
    elif kind == '-m':
        sys.argv, sys.path[0] = ['-m', *rest[1:]], os.getcwd()
        runpy._run_module_as_main(rest[0])
    else:
        sys.argv, sys.path[0] = args, os.path.dirname(os.path.realpath(kind))
        main.__file__ = kind
        with open(kind, 'rb') as f: code = compile(f.read(), kind, 'exec')
        exec(code, main.__dict__)


def done(args):
    """The exit code of a program, as Python gives it at its end; what it has on hand is written.

    Python also takes its modules apart, which nobody sees, and which takes most of a second here."""
    try: code = told = become(args)
    except SystemExit as e: code = told = e.code
    except BaseException as e:
        trace = e.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__: trace = trace.tb_next
        e.__traceback__ = trace
        sys.excepthook(type(e), e, trace)
        told, code = None, -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    if not (told is None or isinstance(told, int)):
        print(told, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try: stream.closed or stream.flush()
        except OSError as e:
            code = code or 120
            if stream is sys.stdout: print('Exception ignored at the end:', repr(e), file=sys.stderr)
    return code or 0


def imported():
    "Import everything; is the one thread of this process alone?"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in modules():
            try: importlib.import_module(name)
            except ImportError: pass                # an extra that is not here: who needs it says so
    gc.collect()
    gc.freeze()
    return len(os.listdir('/proc/self/task')) == 1


if __name__ == '__main__':
    if sys.argv[1] == 'stand-in': be_another(sys.argv[2:])
    sys.path[0] = str(root)
    variables = dict(os.environ)
    with socket.socket(fileno=int(sys.argv[1])) as place:
        request, fds = serve(place, imported(), variables)
    settle(request, fds, paths(variables))
    if os.environ.get(nested): subprocess.Popen = Popen
    code = done(request['args'])
    if code == -signal.SIGINT: end_by(signal.SIGINT)
    os._exit(code & 255)
